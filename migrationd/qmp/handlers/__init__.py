"""One small function for each command; the table is in ``table.py``."""
