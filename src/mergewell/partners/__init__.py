"""Choosing partners: which experts to merge, and how many."""
