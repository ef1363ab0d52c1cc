"""Calibration: statistics of a few unlabelled inputs, gathered in one walk and kept in a file."""
