"""The GPU run."""
