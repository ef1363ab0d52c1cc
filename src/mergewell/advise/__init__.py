"""Advice for fine-tuning experts that shall merge: a bound, what dominates it, what to turn."""
