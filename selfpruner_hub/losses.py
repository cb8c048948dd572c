"""Predicted losses: what a layer's width costs on its own, and what a small change of a whole plan does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEP = 0.05
"""A step of an FFN, as a fraction of its dense channels; a step of an attention is one KV group."""


@dataclass(frozen=True)
class LossCurves:
    """Predicted loss of one layer, alone, by what it keeps.

    Attributes:
        attention: For 0, 1, …, G KV groups kept, `[G + 1]`, in nats per token.
        ffn: For 0, 1, …, F channels kept, `[F + 1]`, in nats per token.
    """

    attention: NDArray[np.float64]
    ffn: NDArray[np.float64]


@dataclass(frozen=True)
class Slopes:
    """Predicted change of the loss around a plan, in nats per token, one figure a layer; infinite where impossible.

    Attributes:
        attention_removed: When the layer loses one KV group more.
        attention_restored: When it gets one back; usually negative.
        ffn_removed: When it loses a step of FFN channels more.
        ffn_restored: When it gets a step back; usually negative.
    """

    attention_removed: tuple[float, ...]
    attention_restored: tuple[float, ...]
    ffn_removed: tuple[float, ...]
    ffn_restored: tuple[float, ...]

    def to_json(self) -> dict[str, list[float | None]]:
        """Lists, with None for what is impossible."""
        return {name: [round(x, 6) if math.isfinite(x) else None for x in v] for name, v in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Slopes:
        """Undo `to_json`."""
        return cls(**{name: tuple(math.inf if x is None else float(x) for x in v) for name, v in values.items()})
