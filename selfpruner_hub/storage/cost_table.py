"""Cost tables: measured costs of models of several widths in a runtime on a machine, kept in a file and reused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from selfpruner_hub.errors import OutputError, SavedModelError
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape
from selfpruner_hub.plans.target import Target
from selfpruner_hub.storage.staging import write_atomically
from selfpruner_hub.storage.versioned_json import parse_versioned

COST_TABLE_VERSION = 1
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Point:
    """Measured cost of a model whose layers all have the same widths."""

    num_hidden_layers: int
    num_key_value_heads: int
    intermediate_size: int
    prefill: float
    """Milliseconds of the prompt."""
    decode: float
    """Milliseconds of each token after it."""
    size: int
    """Bytes of the files of weights."""

    def cost(self, target: Target) -> float:
        """Return the cost in the unit of a target: milliseconds of a request, or bytes."""
        return self.prefill + target.new_tokens * self.decode if target.unit == "ms" else float(self.size)


@dataclass(frozen=True)
class CostTable:
    """Content of the file of a table; field names are its keys."""

    key: dict[str, Any]
    """Shape of the model, runtime, machine, versions and request that the table is for, as JSON values."""
    points: tuple[Point, ...]
    """First one of as many layers as the dense model, each with its largest widths; then models of fewer layers: with
    these widths, and with narrower FFNs or attentions, not both."""
    schema_version: int = COST_TABLE_VERSION

    def costs(self, shape: ModelShape, target: Target) -> Costs:
        """Fit a cost of a KV group and one of an FFN channel; the rest of the whole model's cost is a constant.

        Single times scatter, so each part has one slope, by least squares over the dense model and those with less of
        this part. The parts are fitted apart: llama.cpp is slower with two KV heads than with three, and such times
        must not bend the line of the channels. A part that is not seen to save anything costs nothing.

        Args:
            shape: Geometry of the dense model that the table was measured for.
            target: Target that says what is counted.

        Returns:
            The costs, in the unit of the target.
        """
        whole, dense, *narrower = self.points

        def slope(width: str, other: str) -> float:
            """Cost of one unit of this width, with the other part as wide as in the dense model."""
            points = [dense, *(p for p in narrower if getattr(p, other) == getattr(dense, other))]
            widths = [getattr(p, width) for p in points]
            if len(set(widths)) < 2:
                return 0.0
            costs = [p.cost(target) / p.num_hidden_layers for p in points]
            return max(0.0, float(np.polyfit(widths, costs, 1)[0]))

        group = slope("num_key_value_heads", "intermediate_size")
        channel = slope("intermediate_size", "num_key_value_heads")
        layers = shape.num_layers
        even = shape.plan([whole.intermediate_size] * layers, [whole.num_key_value_heads] * layers)
        constant = whole.cost(target) - Costs.linear(replace(shape, dense=even), group, channel).prunable
        return Costs.linear(shape, group, channel, constant, unit=target.unit)

    def to_json(self) -> str:
        """Serialise, schema version first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> CostTable:
        """Read strictly.

        Args:
            text: Content of the file.
            source: Name of the file, for error messages.

        Returns:
            The table.

        Raises:
            SavedModelError: The text is not such a table.
        """
        values = parse_versioned(text, source, COST_TABLE_VERSION, cls)
        try:
            return cls(**{**values, "points": tuple(Point(**point) for point in values["points"])})
        except TypeError as error:
            raise SavedModelError(f"{source} is damaged: {error}.", "Delete it.") from error


def folder() -> Path:
    """Directory of the tables of this user on this machine; `RuntimeError` where the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "selfpruner_hub" / "costs"


def read_table(key: Mapping[str, Any]) -> CostTable | None:
    """Read the table with a key; None where there is none that can be read."""
    try:
        path = _path(key)
        table = CostTable.from_json(path.read_text(encoding="utf-8"), str(path))
    except (OSError, RuntimeError, UnicodeDecodeError, SavedModelError):  # measured again, and replaced
        return None
    return table if table.key == key else None


def keep_table(key: Mapping[str, Any], points: Sequence[Point]) -> CostTable:
    """Make a table, and write it where `read_table` finds it; where that cannot be written, warn.

    Args:
        key: What the table is for, as JSON values.
        points: What was measured, as in `CostTable.points`.

    Returns:
        The table.
    """
    table = CostTable(dict(key), tuple(points))
    try:
        write_atomically(_path(key), table.to_json())
    except (OutputError, RuntimeError) as error:
        logger.warning("The costs are measured again in the next run: %s", getattr(error, "message", error))
    return table


def _path(key: Mapping[str, Any]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return folder() / f"{key['runtime']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
