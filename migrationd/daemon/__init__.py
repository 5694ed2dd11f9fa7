"""The composition root: builds everything, implements what the monitor commands."""
