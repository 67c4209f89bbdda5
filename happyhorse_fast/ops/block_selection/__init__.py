"""Choice of the key blocks that a block of queries attends to."""
