"""Modules: made from checkpoints, traced, run and combined; the only place that makes one."""
