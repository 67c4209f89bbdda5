"""Public kernels that do the work of a case."""
