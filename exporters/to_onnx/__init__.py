"""Export to ONNX."""

from exporters.to_onnx.writer import write

__all__ = ["write"]
