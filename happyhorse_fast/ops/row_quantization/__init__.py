"""int8 codes of rows."""
