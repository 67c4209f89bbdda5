"""CUDA device code, compiled by nvcc at build time or NVRTC at run time; installed as ``happyhorse_fast.csrc``."""
