"""Launchers of the Triton kernels; the one place that imports them, itself imported when an op is first used."""
