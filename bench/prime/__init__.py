"""Kernels of a GPU run, compiled before it."""
