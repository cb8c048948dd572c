"""Files: records, checkpoints, and tensors in files; a file is written completely or not at all."""
