"""What lies on disk: records, checkpoints, tensors in files; written whole or not at all."""
