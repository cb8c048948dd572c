"""Export to OpenVINO."""

from exporters.to_openvino.writer import write

__all__ = ["write"]
