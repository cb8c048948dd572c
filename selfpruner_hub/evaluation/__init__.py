"""Evaluation: score plans, and measure models."""
