"""The published model in plain PyTorch."""
