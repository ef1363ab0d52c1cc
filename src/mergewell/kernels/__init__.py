"""Fused compiled forms of methods and statistics, bit for bit the same as the torch forms."""
