"""Predicted losses: of each layer alone by its width, and of small changes of a whole plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from selfpruner_hub.plans.plan import Plan

STEP = 0.05
"""Step of an FFN, as a fraction of its dense units; the step of an attention is `kv_multiple` KV groups."""


@dataclass(frozen=True)
class LossCurves:
    """Predicted loss if only this layer is pruned, by the widths that it keeps.

    Attributes:
        attention: Predicted loss with 0, 1, …, G KV groups kept, `[G + 1]`, in nats per token.
        ffn: Predicted loss with 0, 1, …, F channels or routed experts kept, `[F + 1]`, in nats per token.
    """

    attention: NDArray[np.float64]
    ffn: NDArray[np.float64]


def loss_alone(curves: Sequence[LossCurves], plan: Plan) -> float:
    """The sum of the layers' predicted losses under a plan, in nats per token."""
    pairs = zip(curves, plan.layers, strict=True)
    return sum(float(c.attention[w.num_key_value_heads] + c.ffn[w.intermediate_size]) for c, w in pairs)


@dataclass(frozen=True)
class StepEffects:
    """Predicted changes of the loss around a plan, in nats per token, one per layer; infinite if a step is impossible.

    Attributes:
        attention_removed: Change if the layer loses one more step of KV groups.
        attention_restored: Change if the layer gets one step of KV groups back; usually negative.
        ffn_removed: Change if the layer loses one more step of FFN channels.
        ffn_restored: Change if the layer gets one step of FFN channels back; usually negative.
    """

    attention_removed: tuple[float, ...]
    attention_restored: tuple[float, ...]
    ffn_removed: tuple[float, ...]
    ffn_restored: tuple[float, ...]

    def to_json(self) -> dict[str, list[float | None]]:
        """Convert to lists, with None for impossible steps."""
        return {name: [round(x, 6) if math.isfinite(x) else None for x in v] for name, v in vars(self).items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StepEffects:
        """Rebuild from the result of `to_json`."""
        return cls(**{name: tuple(math.inf if x is None else float(x) for x in v) for name, v in values.items()})


def step_channels(intermediate_size: int) -> int:
    """Number of FFN channels, or of routed experts, in one step."""
    return max(1, round(STEP * intermediate_size))
