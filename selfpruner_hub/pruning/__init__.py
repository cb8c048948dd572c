"""Pruning: rank FFN channels and KV groups, cut them, and repair the remaining weights."""
