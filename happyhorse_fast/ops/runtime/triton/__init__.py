"""Launching of Triton kernels, and their interpreter on the CPU."""
