"""Learners: what makes a recipe from a recipe and data, one file each."""
