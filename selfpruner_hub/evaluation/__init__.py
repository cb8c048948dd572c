"""Evaluation: the score of a plan, and the figures of a model."""
