"""State shared by both directions: status, options, statistics. Pure."""
