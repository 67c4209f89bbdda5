"""Measure errors of ops, layers, models and clips, ranges of activations, and the time of each op."""
