"""Calibration: text, and the statistics and Fisher information that a model has on it."""
