"""Alignment: the units of one model put in the order of another's, so that both can be merged."""
