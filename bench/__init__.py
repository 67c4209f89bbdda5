"""Measurements of the kernels; not part of the installed package."""
