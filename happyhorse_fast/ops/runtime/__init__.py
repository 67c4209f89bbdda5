"""Choice, checks and launch of an op's implementation."""
