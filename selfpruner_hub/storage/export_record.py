"""`selfpruner_export.json`: a versioned record of how an export was made and how far it is from PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.storage.layout import EXPORTS
from selfpruner_hub.storage.versioned_json import Amount, Count, parse_versioned

EXPORT_RECORD_FILE = "selfpruner_export.json"
"""Name of the file; not `export.json`, since transformers' exporters write a manifest of that name."""
EXPORT_RECORD_VERSION = 1


@dataclass(frozen=True)
class ExportRecord:
    """Content of `selfpruner_export.json`; field names are its keys."""

    format: str
    options: dict[str, Any]
    source: dict[str, Any]
    """`name` of the PyTorch model, and the identity that it has in float32 (`models.weights.identity_of`)."""
    versions: dict[str, str]
    tolerance: float
    max_difference: float | None
    """Largest difference of a logit from PyTorch's in float32, measured before the export was moved to its directory;
    of ONNX in int8 the KL divergence in nats from PyTorch with rounded weights."""
    unchecked: str
    """Reason why `max_difference` is None; empty where it is measured."""
    remark: str
    """Note for the users of the export; empty where there is none."""
    schema_version: int = EXPORT_RECORD_VERSION

    @property
    def has_hub_layout(self) -> bool:
        """Whether the export is for ONNX Runtime GenAI and Transformers.js (`--layout hub`)."""
        return self.options.get("layout") == "hub"

    def to_json(self) -> str:
        """Serialise, schema version first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2, allow_nan=False) + "\n"


def read_export(directory: Path, expected: str | None = None) -> ExportRecord:
    """Read the record of an export, strictly; `exporters.format.Format.read` checks its options too.

    Args:
        directory: Directory of `selfpruner_export.json`.
        expected: Format that the export must have; None takes any.

    Returns:
        The record.

    Raises:
        SavedModelError: The directory holds no export, one of another format, or a damaged record.
    """
    path = directory / EXPORT_RECORD_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SavedModelError(
            f"{str(directory)!r} holds no export (no readable {EXPORT_RECORD_FILE}).",
            "Give a directory written by `selfpruner export`.",
        ) from error
    inner = {
        "source": _Source, "format": Literal[tuple(EXPORTS)], "tolerance": Amount, "max_difference": Amount | None,
    }  # fmt: skip
    values = parse_versioned(text, str(path), EXPORT_RECORD_VERSION, ExportRecord, inner)
    if expected is not None and values["format"] != expected:
        raise SavedModelError(
            f"{str(directory)!r} holds an export to {values['format']}, not to {expected}.",
            f"Export the model with --to {expected}.",
        )
    return ExportRecord(**values)


class _Source(TypedDict):
    """Fields of the source that are read from a record."""

    name: str
    model_type: str
    parameters: Count
    weights: NotRequired[str | None]
    configuration: NotRequired[str]
