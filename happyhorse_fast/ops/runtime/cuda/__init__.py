"""Loading and launching of CUDA kernels."""
