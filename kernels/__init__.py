"""Triton device code, imported as ``happyhorse_fast.kernels``; see docs/DESIGN.md for what it may import."""
