"""Where things are: the folders of a saved model, and those that the package brings."""

from __future__ import annotations

from pathlib import Path

PLOTS = "plots"
EXPORTS = ("onnx", "tensorrt", "openvino", "gguf", "padded")
"""Folders of a published model: pictures of its search, and exports, each named after its format."""


def asset(name: str) -> Path:
    """A folder that a wheel carries inside the package, and a checkout beside it."""
    inside = Path(__file__).parents[1] / name
    return inside if inside.is_dir() else Path(__file__).parents[2] / name
