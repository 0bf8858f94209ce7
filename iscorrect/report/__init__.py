"""Pages about a dump."""
