"""Plans: the widths that every layer keeps, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MULTIPLES = (128, 64, 32, 16, 8)
"""Numbers that hardware likes FFN widths to be multiples of. Most kernels of tensor cores need rows of 16 bytes, 8
numbers of 16 bits; their tiles, and the blocks of quantised weights, are larger."""
FEWEST_WIDTHS = 48
"""Fewest widths that are left to choose from: a step of 2 % of the rate."""


@dataclass(frozen=True, order=True)
class LayerWidths:
    """The prunable widths of one decoder layer."""

    intermediate_size: int
    """Number of FFN channels: rows of gate_proj and up_proj, columns of down_proj."""
    num_key_value_heads: int
    """Number of KV groups: a key/value head and the query heads that share it."""


@dataclass(frozen=True)
class Plan:
    """The widths that every decoder layer keeps, first layer first."""

    layers: tuple[LayerWidths, ...]

    @classmethod
    def of(cls, intermediate_sizes: Sequence[int], num_key_value_heads: Sequence[int]) -> Plan:
        """Build a plan from one list of FFN widths and one of KV groups, both of length `L`."""
        return cls(tuple(LayerWidths(f, g) for f, g in zip(intermediate_sizes, num_key_value_heads, strict=True)))


def widths_of(plan: Plan) -> dict[str, list[int]]:
    """The widths of a plan in the format of files: one list per width, first layer first."""
    return {
        "intermediate_size": [w.intermediate_size for w in plan.layers],
        "num_key_value_heads": [w.num_key_value_heads for w in plan.layers],
    }


def plan_of(widths: Mapping[str, Sequence[int]]) -> Plan:
    """Build a plan from widths in the format of files; other keys are ignored, and other values are a `ValueError`."""
    plan = Plan.of(widths["intermediate_size"], widths["num_key_value_heads"])
    if not plan.layers or any(type(n) is not int or n < 1 for w in plan.layers for n in vars(w).values()):
        raise ValueError("every width must be a whole number from 1 on")
    return plan


@dataclass(frozen=True)
class ModelShape:
    """The prunable geometry of a dense model; counts are weights of q, k, v, o, gate, up and down (no biases)."""

    hidden_size: int
    head_dim: int
    queries_per_group: int
    """Number of query heads that share one key/value head; the same in every layer, and not changed by pruning."""
    dense: Plan
    ffn_matrices: int = 3
    """Number of weight matrices of an FFN: 3 with a gate, else 2."""
    whole_attention: bool = False
    """Whether every layer keeps all of its KV groups."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ModelShape:
        """Build a geometry from the format of files, as `record` returns it."""
        names = ("hidden_size", "head_dim", "queries_per_group", "ffn_matrices")
        return cls(**{name: record[name] for name in names}, dense=plan_of(record))

    def record(self) -> dict[str, Any]:
        """The geometry in the format of files, with the weights of a KV group and of an FFN channel for its readers."""
        return {
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "queries_per_group": self.queries_per_group,
            "ffn_matrices": self.ffn_matrices,
            "group_weights": self.group_weights,
            "channel_weights": self.channel_weights,
            **widths_of(self.dense),
        }

    @property
    def num_layers(self) -> int:
        """Number of decoder layers `L`."""
        return len(self.dense.layers)

    @property
    def channel_weights(self) -> int:
        """Number of weights of one FFN channel."""
        return self.ffn_matrices * self.hidden_size

    @property
    def default_multiple(self) -> int:
        """Largest of `MULTIPLES` that divides every FFN width and leaves `FEWEST_WIDTHS` of them; 1 if none does."""
        dense = {w.intermediate_size for w in self.dense.layers}
        fits = (n for n in MULTIPLES if all(f % n == 0 and f // n >= FEWEST_WIDTHS for f in dense))
        return next(fits, 1)

    @property
    def group_weights(self) -> int:
        """Number of weights of one KV group."""
        return 2 * self.hidden_size * self.head_dim * (self.queries_per_group + 1)

    def contains(self, plan: Plan) -> bool:
        """Whether a plan has as many layers, and none is wider than it is here."""
        pairs = zip(plan.layers, self.dense.layers, strict=False)
        return len(plan.layers) == self.num_layers and all(
            kept.intermediate_size <= dense.intermediate_size and kept.num_key_value_heads <= dense.num_key_value_heads
            for kept, dense in pairs
        )

    def layer_weights(self, widths: LayerWidths) -> int:
        """Count the prunable weights of a layer with these widths."""
        return widths.intermediate_size * self.channel_weights + widths.num_key_value_heads * self.group_weights

    def weights(self, plan: Plan) -> int:
        """Count the prunable weights of the whole model under `plan`."""
        return sum(self.layer_weights(widths) for widths in plan.layers)

    def rates(self, plan: Plan) -> tuple[float, ...]:
        """Fraction of its prunable weights that each layer loses under `plan`, in [0, 1)."""
        return tuple(
            1 - self.layer_weights(kept) / self.layer_weights(dense)
            for kept, dense in zip(plan.layers, self.dense.layers, strict=True)
        )

    def beta(self, plan: Plan) -> float:
        """Fraction of all prunable weights that `plan` removes: Σ p_l n_l / Σ n_l."""
        return 1 - self.weights(plan) / self.weights(self.dense)
