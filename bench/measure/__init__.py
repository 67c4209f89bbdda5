"""Times, and what must hold before one counts."""
