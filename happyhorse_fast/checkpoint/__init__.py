"""Checkpoints and LoRAs on disk."""
