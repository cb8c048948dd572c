"""Calibration: read or generate text, and measure a model's statistics and Fisher information on it."""
