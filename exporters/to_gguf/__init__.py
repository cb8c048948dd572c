"""Export to GGUF."""

from exporters.to_gguf.writer import write

__all__ = ["write"]
