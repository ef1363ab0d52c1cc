"""Distil: weights that are taught by the experts' own outputs, and where they are written."""
