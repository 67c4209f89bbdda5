"""The accelerated model."""
