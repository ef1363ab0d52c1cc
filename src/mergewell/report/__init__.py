"""The report: results read back, figures as SVG, one self-contained page."""
