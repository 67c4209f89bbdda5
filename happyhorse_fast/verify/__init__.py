"""Measurements of error: of layers, models, clips."""
