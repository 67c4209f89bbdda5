"""CUDA kernels without a compiled extension: binaries or NVRTC, loaded and launched through the driver API."""
