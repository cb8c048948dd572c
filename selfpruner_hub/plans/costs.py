"""Costs of every width of every part: parameters, milliseconds or bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from selfpruner_hub.plans.plan import ModelShape, Plan

Table = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Costs:
    """Costs of the parts of a model, by the widths that they keep; the costs of a plan add up.

    Attributes:
        attention: One table per layer, `[G + 1]`: entry g is the cost of g KV groups. Entry 0 is 0, and no entry is
            less than the one before.
        ffn: One table per layer, `[F + 1]`: entry f is the cost of f units (channels or routed experts),
            with the same two properties.
        constant: Cost of everything that pruning leaves as it is: embeddings, output head, norms.
        unit: Unit of all costs: `weights`, `ms` or `bytes`.
    """

    attention: tuple[Table, ...]
    ffn: tuple[Table, ...]
    constant: float = 0.0
    unit: str = "weights"

    @classmethod
    def of_parameters(cls, shape: ModelShape) -> Costs:
        """Count the prunable weights of every width."""
        return cls.linear(shape, shape.group_weights, shape.unit_weights)

    @classmethod
    def linear(
        cls, shape: ModelShape, group: float, channel: float, constant: float = 0.0, unit: str = "weights"
    ) -> Costs:
        """Charge the same for each KV group, and the same for each FFN unit.

        Args:
            shape: Geometry of the dense model.
            group: Cost of a KV group.
            channel: Cost of an FFN channel, or of a routed expert.
            constant: Cost of everything else.
            unit: Unit of the costs.

        Returns:
            The costs of every width.
        """
        return cls(
            _by_layer([w.num_key_value_heads for w in shape.dense.layers], group),
            _by_layer([w.intermediate_size for w in shape.dense.layers], channel),
            constant,
            unit,
        )

    @property
    def prunable(self) -> float:
        """Cost of all parts at their dense widths, without the constant."""
        return float(sum(table[-1] for table in (*self.attention, *self.ffn)))

    @property
    def dense(self) -> float:
        """Cost of the dense model."""
        return self.constant + self.prunable

    def of(self, plan: Plan) -> float:
        """Cost of the whole model under a plan."""
        parts = zip(self.attention, self.ffn, plan.layers, strict=True)
        return self.constant + float(sum(a[w.num_key_value_heads] + f[w.intermediate_size] for a, f, w in parts))

    def share(self, plan: Plan) -> float:
        """Share of the prunable cost that a plan removes, in [0, 1)."""
        return (self.dense - self.of(plan)) / self.prunable

    def group(self, layer: int) -> float:
        """Mean cost of a KV group of a layer."""
        return _mean(self.attention[layer])

    def channel(self, layer: int) -> float:
        """Mean cost of an FFN unit of a layer."""
        return _mean(self.ffn[layer])

    def digest(self) -> str:
        """Hash of all tables, to tell these costs from others."""
        digest = hashlib.sha256(f"{self.constant!r} {self.unit}".encode())
        for table in (*self.attention, *self.ffn):
            digest.update(table.tobytes())
        return digest.hexdigest()


def _by_layer(widths: Sequence[int], cost: float) -> tuple[Table, ...]:
    tables = {width: cost * np.arange(width + 1, dtype=np.float64) for width in set(widths)}
    return tuple(tables[width] for width in widths)


def _mean(table: Table) -> float:
    return float(table[-1]) / max(1, len(table) - 1)
