"""Out of PyTorch, and how fast it is there."""
