"""Engines: where blocks of work are carried out, within a budget of bytes."""
