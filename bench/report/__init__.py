"""README's tables, the report and its figures from committed results."""
