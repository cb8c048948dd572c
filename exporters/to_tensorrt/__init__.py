"""Export to TensorRT."""

from exporters.to_tensorrt.writer import write

__all__ = ["write"]
