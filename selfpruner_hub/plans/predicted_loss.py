"""Predicted losses: what a layer's width costs on its own, and what a small change of a whole plan does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfpruner_hub.plans.plan import ModelShape, Plan

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


def loss_alone(curves: Sequence[LossCurves], plan: Plan) -> float:
    """The sum of what the layers of a plan cost alone, in nats per token."""
    pairs = zip(curves, plan.layers, strict=True)
    return sum(float(c.attention[w.num_key_value_heads] + c.ffn[w.intermediate_size]) for c, w in pairs)


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


def paying_moves(slopes: Slopes, shape: ModelShape) -> dict[str, list[int]]:
    """The small changes that pay together: what is given back gains more than what makes room for it costs.

    Both are taken in order of the loss that they save or cost a weight, until the two prices meet: the knapsack over
    one step of every part, around the plan where the slopes were measured.

    Args:
        slopes: Predicted changes of the loss.
        shape: Geometry of the dense model.

    Returns:
        By field of `Slopes`, the layers (from 0) to change, the best first. A part of a layer goes one way only.
    """
    sizes = {
        "attention": [shape.group_weights] * shape.num_layers,
        "ffn": [step_channels(w.intermediate_size) * shape.channel_weights for w in shape.dense.layers],
    }
    ranked: dict[str, list[tuple[float, str, int]]] = {"removed": [], "restored": []}
    for name, changes in vars(slopes).items():
        part, _, way = name.partition("_")
        sign = 1 if way == "removed" else -1
        ranked[way] += [(sign * c / sizes[part][i], part, i) for i, c in enumerate(changes) if math.isfinite(c)]
    removed, restored = sorted(ranked["removed"]), sorted(ranked["restored"], reverse=True)
    found: dict[str, list[int]] = {name: [] for name in vars(slopes)}
    taken: set[tuple[str, int]] = set()
    spare = 0  # weights that were removed and not yet given back; below 0, those that are still to be removed
    cost = gain = 0.0  # prices of the moves that were taken last
    while moves := (restored if spare > 0 else removed):
        price, part, layer = moves.pop(0)
        if (part, layer) in taken:
            continue
        if moves is restored:
            if price <= cost:
                break
            gain, way, sign = price, "restored", -1
        else:
            if price >= (gain if spare < 0 else restored[0][0] if restored else 0.0):
                break
            cost, way, sign = price, "removed", 1
        taken.add((part, layer))
        found[f"{part}_{way}"].append(layer)
        spare += sign * sizes[part][layer]
    return found


def step_channels(intermediate_size: int) -> int:
    """FFN channels of one step."""
    return max(1, round(STEP * intermediate_size))
