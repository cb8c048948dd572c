"""Records of exports that took no time to make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selfpruner_hub.storage.export_record import ExportRecord

OPTIONS: dict[str, dict[str, Any]] = {
    "onnx": {"dtype": "float32", "fusions": "cpu", "layout": "transformers"},
    "gguf": {"dtype": "q8_0", "tokenizer_from": None, "imatrix": None},
    "openvino": {"dtype": "float32"},
    "tensorrt": {
        "dtype": "float32", "context": 64, "library": "tensorrt_rtx", "compute_capability": "8.6", "sha256": "",
    },
}  # fmt: skip
"""Options that the record of each format has."""


def export_record(form: str, identity: Mapping[str, Any], **options: Any) -> ExportRecord:
    """The record of an export of the model with this identity."""
    source = {"name": "tests/llama", **identity}
    return ExportRecord(form, {**OPTIONS[form], **options}, source, {}, 0.1, 0.0, "", "")
