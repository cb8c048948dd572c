"""Plans: the widths that every layer keeps, and the rates that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MULTIPLES = (128, 64, 32, 16, 8)
"""Numbers that hardware likes FFN widths to be multiples of. Most kernels of tensor cores need rows of 16 bytes, 8
numbers of 16 bits; their tiles, and the blocks of quantised weights, are larger."""
BY_CHANNEL, BY_EXPERT = "intermediate_size", "num_experts"
"""Names of the widths of FFNs in files, by what their units are."""
FEWEST_WIDTHS = 48
"""Fewest widths that are left to choose from: a step of 2 % of the rate."""


@dataclass(frozen=True, order=True)
class LayerWidths:
    """The prunable widths of one decoder layer."""

    intermediate_size: int
    """Number of units of the FFN: channels, which are rows of gate_proj and up_proj and columns of down_proj, or in a
    mixture of experts, routed experts (0 in a layer without any)."""
    num_key_value_heads: int
    """Number of KV groups: a key/value head and the query heads that share it."""


@dataclass(frozen=True)
class Plan:
    """The widths that every decoder layer keeps, first layer first."""

    layers: tuple[LayerWidths, ...]
    ffn_unit: str = field(default=BY_CHANNEL, repr=False, hash=False)
    """Name of the FFN's widths in files: `BY_CHANNEL` or `BY_EXPERT`. Text has another hash in each process."""

    @classmethod
    def of(
        cls, intermediate_sizes: Sequence[int], num_key_value_heads: Sequence[int], ffn_unit: str = BY_CHANNEL
    ) -> Plan:
        """Build a plan from one list of FFN widths and one of KV groups, both of length `L`, and the FFNs' unit."""
        pairs = zip(intermediate_sizes, num_key_value_heads, strict=True)
        return cls(tuple(LayerWidths(f, g) for f, g in pairs), ffn_unit)


def removed_rate(kept: float, dense: float) -> float:
    """Fraction of a part that a layer loses, in [0, 1]; 0 where the layer has none of it."""
    return 1 - kept / dense if dense else 0.0


def widths_of(plan: Plan) -> dict[str, list[int]]:
    """The widths of a plan in the format of files: one list per width, first layer first."""
    return {
        plan.ffn_unit: [w.intermediate_size for w in plan.layers],
        "num_key_value_heads": [w.num_key_value_heads for w in plan.layers],
    }


def plan_of(widths: Mapping[str, Sequence[int]]) -> Plan:
    """Build a plan from widths in the format of files; other keys are ignored, and other values are a `ValueError`."""
    unit = BY_EXPERT if BY_EXPERT in widths else BY_CHANNEL
    plan, least = Plan.of(widths[unit], widths["num_key_value_heads"], unit), 0 if unit == BY_EXPERT else 1
    if not plan.layers or any(type(n) is not int or n < least for w in plan.layers for n in vars(w).values()):
        raise ValueError(f"every width must be a whole number from {least} on")
    return plan


@dataclass(frozen=True)
class ModelShape:
    """The prunable geometry of a model before it is pruned, called dense.

    Counts are weights of q, k, v, o, gate, up and down (no biases); of a mixture, those of routed experts and routers.
    """

    hidden_size: int
    head_dim: int
    queries_per_group: int
    """Number of query heads that share one key/value head; the same in every layer, and not changed by pruning."""
    dense: Plan
    ffn_matrices: int = 3
    """Number of weight matrices of an FFN: 3 with a gate, else 2."""
    whole_attention: bool = False
    """Whether every layer keeps all of its KV groups."""
    expert_weights: int = 0
    """Number of weights of a routed expert, with its row of the router. Where it is above 0, the units of FFNs are
    experts, and nothing else is prunable: attention, shared experts and layers without routed ones count for 0."""
    fewest_units: int = 1
    """Fewest units that an FFN keeps: the experts that a token is routed to, or one channel."""

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ModelShape:
        """Build a geometry from the format of files, as `record` returns it."""
        names = ("hidden_size", "head_dim", "queries_per_group", "ffn_matrices")
        of_experts = {name: record[name] for name in ("expert_weights", "fewest_units") if name in record}
        geometry = {**{name: record[name] for name in names}, **of_experts}
        return cls(**geometry, dense=plan_of(record), whole_attention=bool(of_experts))

    def record(self) -> dict[str, Any]:
        """The geometry in the format of files, with the weights of a KV group and of an FFN channel for its readers."""
        return {
            "hidden_size": self.hidden_size,
            "head_dim": self.head_dim,
            "queries_per_group": self.queries_per_group,
            "ffn_matrices": self.ffn_matrices,
            "group_weights": self.group_weights,
            **(
                {"expert_weights": self.expert_weights, "fewest_units": self.fewest_units}
                if self.expert_weights
                else {"channel_weights": self.unit_weights}
            ),
            **widths_of(self.dense),
        }

    def plan(self, ffn_units: Sequence[int], num_key_value_heads: Sequence[int]) -> Plan:
        """Build a plan of this model from one list of FFN widths and one of KV groups."""
        return Plan.of(ffn_units, num_key_value_heads, self.dense.ffn_unit)

    @property
    def least(self) -> tuple[LayerWidths, ...]:
        """Narrowest widths of each layer."""
        return tuple(
            LayerWidths(
                min(self.fewest_units, w.intermediate_size), w.num_key_value_heads if self.whole_attention else 1
            )
            for w in self.dense.layers
        )

    @property
    def num_layers(self) -> int:
        """Number of decoder layers `L`."""
        return len(self.dense.layers)

    @property
    def unit_weights(self) -> int:
        """Number of weights of one unit of an FFN: of a channel, or of a routed expert."""
        return self.expert_weights or self.ffn_matrices * self.hidden_size

    @property
    def default_multiple(self) -> int:
        """Largest of `MULTIPLES` that divides every FFN width and leaves `FEWEST_WIDTHS` of them; 1 if none does.

        Experts have no such multiple: a product reads the rows of one of them.
        """
        if self.expert_weights:
            return 1
        dense = {w.intermediate_size for w in self.dense.layers}
        fits = (n for n in MULTIPLES if all(f % n == 0 and f // n >= FEWEST_WIDTHS for f in dense))
        return next(fits, 1)

    @property
    def group_weights(self) -> int:
        """Number of prunable weights of one KV group; 0 in a mixture of experts."""
        return 0 if self.expert_weights else 2 * self.hidden_size * self.head_dim * (self.queries_per_group + 1)

    def said_least(self, kv_multiple: int) -> str:
        """Say what every layer keeps, where no more than `kv_multiple` of its KV heads must stay."""
        if self.expert_weights:
            return f"at least {self.fewest_units} of its experts"
        return f"{'all' if self.whole_attention else f'at least {kv_multiple}'} of its KV heads"

    def contains(self, plan: Plan) -> bool:
        """Whether a plan has as many layers, and none is wider than it is here."""
        pairs = zip(plan.layers, self.dense.layers, strict=False)
        return len(plan.layers) == self.num_layers and all(
            kept.intermediate_size <= dense.intermediate_size and kept.num_key_value_heads <= dense.num_key_value_heads
            for kept, dense in pairs
        )

    def layer_weights(self, widths: LayerWidths) -> int:
        """Count the prunable weights of a layer with these widths."""
        return widths.intermediate_size * self.unit_weights + widths.num_key_value_heads * self.group_weights

    def weights(self, plan: Plan) -> int:
        """Count the prunable weights of the whole model under `plan`."""
        return sum(self.layer_weights(widths) for widths in plan.layers)

    def rates(self, plan: Plan) -> tuple[float, ...]:
        """Fraction of its prunable weights that each layer loses under `plan`, in [0, 1)."""
        return tuple(
            removed_rate(self.layer_weights(kept), self.layer_weights(dense))
            for kept, dense in zip(plan.layers, self.dense.layers, strict=True)
        )

    def beta(self, plan: Plan) -> float:
        """Fraction of all prunable weights that `plan` removes: Σ p_l n_l / Σ n_l."""
        return 1 - self.weights(plan) / self.weights(self.dense)
