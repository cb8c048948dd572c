"""Pruning: order the channels and groups, cut them, repair what is left."""
