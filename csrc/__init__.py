"""CUDA device code, its build, and the sources that NVRTC compiles; installed as ``happyhorse_fast.csrc``."""
