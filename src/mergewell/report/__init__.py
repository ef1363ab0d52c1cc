"""The report: results as data, figures as pure functions, and one page that works offline."""
