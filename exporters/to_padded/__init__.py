"""Export to a zero-padded model."""

from exporters.to_padded.writer import write

__all__ = ["write"]
