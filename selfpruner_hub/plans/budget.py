"""Turn rates into plans; every plan from this module removes one share of the weights, β, or of their cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from selfpruner_hub.errors import BudgetError
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, Plan, removed_rate
from selfpruner_hub.plans.rounding import clipped, freed, largest_remainder, shift_to_sum
from selfpruner_hub.plans.target import Target, check_beta

TOLERANCE = 1e-3
"""Maximum difference between the requested and the achieved share, if the granularity of the model allows it."""


@dataclass(frozen=True)
class Rates:
    """A proposal: the fractions of its KV groups and of its FFN units (channels, experts) that each layer loses.

    Attributes:
        attention: Fraction of KV groups to remove, one per layer, in [0, 1).
        ffn: Fraction of FFN channels to remove, one per layer, in [0, 1).
    """

    attention: tuple[float, ...]
    ffn: tuple[float, ...]

    @classmethod
    def tied(cls, rates: Sequence[float]) -> Rates:
        """Use one rate per layer for both attention and FFN, as in the paper."""
        return cls(tuple(rates), tuple(rates))


@dataclass(frozen=True)
class Budget:
    """The constraint of the search: share to remove, bounds on each rate, granularity of the widths.

    Args:
        shape: Geometry of the dense model.
        share: Share of the prunable weights to remove, β, 0 < β < 1; with a target, share of their cost.
        p_min: Minimum rate of any layer, in [0, β].
        p_max: Maximum rate of any layer's attention or FFN (of the whole layer if they are tied), in [β, 1). Every
            layer keeps at least one KV group.
        tied: Whether attention and FFN of a layer share one rate (arXiv 2502.14413) instead of two.
        multiple_of: Number of channels that every FFN width is a multiple of (32, 64 or 128 suit most hardware); it
            must divide the dense width. Coarser widths lose a little quality, and make β less exact in small models.
        kv_multiple: Number of KV groups that the groups of every layer are a multiple of, such as the size of tensor
            parallelism; it must divide the dense number of every layer.
        costs: Cost of every width of every part, in whose unit the budget is kept; None counts weights. Parts that
            cost nothing stay whole.
        target: Target in a runtime that the share was computed from (`for_target`); None for a share of weights.

    Raises:
        BudgetError: A value is out of its range, or β or the target cannot be reached within the bounds.
    """

    shape: ModelShape
    share: float
    p_min: float = 0.0
    p_max: float = 0.9
    tied: bool = False
    multiple_of: int = 1
    kv_multiple: int = 1
    costs: Costs = field(default=None, compare=False, repr=False)  # type: ignore[assignment]
    target: Target | None = None

    def __post_init__(self) -> None:
        """Check every value, and whether β can be reached."""
        if self.costs is None:
            object.__setattr__(self, "costs", Costs.of_parameters(self.shape))
        if self.target is None:
            check_beta(self.share)
        elif self.tied:
            raise BudgetError(
                "A target needs a rate for attention and one for the FFN, and tied=true gives both the same.",
                "Set tied=false, or give beta.",
            )
        if not 0 <= self.p_min < self.p_max < 1:
            raise BudgetError(f"Rate bounds must satisfy 0 <= p_min < p_max < 1; got {self.p_min} and {self.p_max}.")
        if self.tied and self.shape.expert_weights:
            raise BudgetError("tied=true cuts attention too, which a mixture of experts keeps.", "Set tied=false.")
        if self.whole_ffn and self.p_min:
            raise BudgetError("p_min has no meaning where FFN channels cost nothing.", "Leave it out.")
        self._check_multiples()
        (least, most), (low, high) = self._reachable(), self._accepted
        if most < low or least > high:
            raise BudgetError(
                f"{self._goal} cannot be reached: with rates in [{self.p_min:g}, {self.p_max:g}] and "
                f"{self.shape.said_least(self.kv_multiple)} in each layer, this model can "
                f"{'reach' if self.target else 'lose'} between {self._figure(least)} and {self._figure(most)}.",
                f"Change {'the target' if self.target else 'beta'} or the bounds.",
            )
        nearest = self.removed_share(self.project(self.spread([self.share] * self.shape.num_layers)))
        if nearest < low or (nearest > high and self.target is None):
            raise BudgetError(
                f"{self._goal} cannot be reached: it lies between two KV groups, where the FFN cannot reach; "
                f"the nearest is {self._figure(nearest)}.",
                f"Change {'the target' if self.target else 'beta'} or the bounds.",
            )

    @classmethod
    def for_target(cls, shape: ModelShape, costs: Costs, target: Target, **bounds: float) -> Budget:
        """Make the budget of a target.

        Args:
            shape: Geometry of the dense model.
            costs: Cost of every width of every part in the target's runtime.
            target: Target to reach.
            **bounds: Other fields of the budget.

        Returns:
            The budget, with the share of the cost that the target asks to remove.

        Raises:
            BudgetError: The target cannot be reached; the message says what can.
        """
        return cls(shape, target.share(costs), **bounds, costs=costs, target=target)  # type: ignore[arg-type]

    @property
    def whole_ffn(self) -> bool:
        """Whether every FFN stays whole, because its channels cost nothing."""
        return not self._unit

    def removed_share(self, plan: Plan) -> float:
        """Share of the weights, or with a target of their cost, that a plan removes."""
        return self.costs.share(plan) if self.target else self.shape.beta(plan)

    def spread(self, values: Sequence[float]) -> Rates:
        """Rates of the layers for the part that bears the budget, the FFN if it costs anything; both if tied."""
        if self.tied:
            return Rates.tied(values)
        nothing = (0.0,) * len(values)
        return Rates(tuple(values), nothing) if self.whole_ffn else Rates(nothing, tuple(values))

    @property
    def _goal(self) -> str:
        return f"{self.target.name} in {self.target.runtime}" if self.target else f"beta={self.share:g}"

    def _figure(self, share: float) -> str:
        return self.target.said_share(share, self.costs) if self.target else f"{share:.3f}"

    @cached_property
    def tolerance(self) -> float:
        """Accepted difference from the share: 0.001, or half the largest step of the FFNs (of KV groups without)."""
        tables = self.costs.attention if self.whole_ffn else self.costs.ffn
        stride = self.kv_multiple if self.whole_ffn else self.multiple_of
        step = max(float(-np.diff(table[::-stride]).min()) for table in tables if len(table) > 1)
        return max(TOLERANCE, step / self.costs.prunable / 2 + 1e-9)

    @property
    def _accepted(self) -> tuple[float, float]:
        """Least and greatest share that is asked for; of a target, more is accepted where no plan is that near."""
        slack = 1e-9 if self.target else self.tolerance + 1e-9
        return self.share - slack, self.share + slack

    @cached_property
    def _unit(self) -> float:
        """Mean cost of `multiple_of` FFN channels, the unit of an FFN's savings."""
        channels = sum(w.intermediate_size for w in self.shape.dense.layers)
        return self.multiple_of * float(sum(table[-1] for table in self.costs.ffn)) / channels

    @cached_property
    def _savings(self) -> list[list[float]]:
        """For each layer, the cost saved without 0, 1, … units of `multiple_of` channels, in `_unit`s."""
        tables = {id(table): table for table in self.costs.ffn}
        saved = {key: ((t[-1] - t[:: -self.multiple_of]) / (self._unit or 1.0)).tolist() for key, t in tables.items()}
        return [saved[id(table)] for table in self.costs.ffn]

    def _saved(self, layer: int, units: float) -> float:
        """Cost that the FFN of a layer saves without so many units; between whole numbers, by linear interpolation."""
        table = self._savings[layer]
        whole = min(max(int(units), 0), len(table) - 2)
        return table[whole] + (units - whole) * (table[whole + 1] - table[whole])

    def _saved_by_groups(self, groups: Sequence[int]) -> float:
        """Cost that is saved without these numbers of KV groups."""
        return sum(float(t[-1] - t[len(t) - 1 - g]) for t, g in zip(self.costs.attention, groups, strict=True))

    def rates(self, plan: Plan) -> Rates:
        """The rates of `plan`: separate for attention and FFN, or one per layer if they are tied."""
        if self.tied:
            return Rates.tied(self.shape.rates(plan))
        pairs = [(vars(kept), vars(dense)) for kept, dense in zip(plan.layers, self.shape.dense.layers, strict=True)]
        names = ("num_key_value_heads", "intermediate_size")
        return Rates(*(tuple(removed_rate(kept[name], dense[name]) for kept, dense in pairs) for name in names))

    def distance(self, rates: Rates, plan: Plan) -> float:
        """Distance between a proposal and its projection: the mean absolute difference over all rates."""
        actual = self.rates(plan)
        pairs = zip(rates.attention + rates.ffn, actual.attention + actual.ffn, strict=True)
        return sum(abs(a - b) for a, b in pairs) / (2 * len(rates.ffn))

    def project(self, rates: Rates, parent: Rates | None = None) -> Plan:
        """Move a proposal to the nearest plan on the budget.

        The proposed numbers of KV groups are rounded first: one group is a large share of a layer. Then one constant
        shifts the FFN rates of all layers within their bounds until the total is met (Euclidean projection onto the
        budget), and they are rounded by largest remainder. Groups change further only if the FFN cannot meet the share.

        Args:
            rates: `L` attention rates and `L` FFN rates; any finite numbers.
            parent: Rates of the plan that the proposal changes: only the layers that differ from it are shifted, if
                their bounds allow it. So the child stays near its parent, and its layers before the first changed one
                are the same. None shifts all layers.

        Returns:
            A plan that removes the share within `tolerance`; with a target, a plan that reaches it.

        Raises:
            BudgetError: The number of rates is not `L`, or a rate is not finite.
        """
        self._check(rates)
        rates = Rates(clipped(rates.attention), clipped(rates.ffn))
        dense = self.shape.dense.layers
        free = [True] * len(dense) if parent is None else _differing(rates, parent)
        rates = self._project_tied(rates.ffn, free) if self.tied else rates
        groups = self._round_groups(rates.attention)
        for_ffn = (self.share * self.costs.prunable - self._saved_by_groups(groups)) / (self._unit or 1.0)
        bounds = self._ffn_bounds(groups)
        proposed = [rate * w.intermediate_size / self.multiple_of for rate, w in zip(rates.ffn, dense, strict=True)]
        shifted = shift_to_sum(proposed, freed(bounds, proposed, free), for_ffn, self._saved)
        units = largest_remainder(shifted, bounds, for_ffn, self._saved, reached=self.target is not None)
        return self.shape.plan(
            [w.intermediate_size - u * self.multiple_of for w, u in zip(dense, units, strict=True)],
            [w.num_key_value_heads - g for w, g in zip(dense, groups, strict=True)],
        )

    def _check_multiples(self) -> None:
        if self.multiple_of < 1 or any(w.intermediate_size % self.multiple_of for w in self.shape.dense.layers):
            widths = sorted({w.intermediate_size for w in self.shape.dense.layers})
            raise BudgetError(
                f"multiple_of={self.multiple_of} does not divide the FFN width {widths}.",
                "Choose a divisor of it, such as 1.",
            )
        for index, w in enumerate(self.shape.dense.layers):
            if self.kv_multiple < 1 or w.num_key_value_heads % self.kv_multiple:
                raise BudgetError(
                    f"kv_multiple={self.kv_multiple} does not divide the {w.num_key_value_heads} KV heads of layer "
                    f"{index}.",
                    "Choose a divisor of them, such as 1.",
                )

    def _check(self, rates: Rates) -> None:
        for name, values in (("attention", rates.attention), ("ffn", rates.ffn)):
            if len(values) != self.shape.num_layers:
                raise BudgetError(f"Expected {self.shape.num_layers} {name} rates, one per layer; got {len(values)}.")
            if not all(math.isfinite(v) for v in values):
                raise BudgetError(f"Every {name} rate must be a finite number.")

    def _ffn_bounds(self, groups: Sequence[int]) -> list[tuple[int, int]]:
        """Bounds on the units of `multiple_of` channels that each layer loses besides its groups.

        p_min bounds the rate of the layer, p_max that of the layer if attention and FFN are tied, else that of the FFN.
        """
        if self.whole_ffn:
            return [(0, 0)] * len(groups)
        bounds = []
        unit = self.multiple_of * self.shape.unit_weights
        for w, least, removed_groups in zip(self.shape.dense.layers, self.shape.least, groups, strict=True):
            most = (w.intermediate_size - least.intermediate_size) // self.multiple_of
            units, gone = w.intermediate_size // self.multiple_of, removed_groups * self.shape.group_weights
            size = self.shape.layer_weights(w)
            low = math.ceil((self.p_min * size - gone) / unit - 1e-9)
            high = math.floor((self.p_max * size - gone) / unit + 1e-9 if self.tied else self.p_max * units + 1e-9)
            bounds.append((min(max(low, 0), most), min(high, most)))
        return bounds

    @cached_property
    def _group_limits(self) -> list[int]:
        """Maximum number of KV groups that each layer loses."""
        limits = []
        for w, least in zip(self.shape.dense.layers, self.shape.least, strict=True):
            spare = (w.num_key_value_heads - least.num_key_value_heads) // self.kv_multiple
            most = math.floor(self.p_max * (w.num_key_value_heads // self.kv_multiple) + 1e-9)
            limits.append(self.kv_multiple * min(most, spare))
        return limits

    def _removed(self, groups: Sequence[int]) -> tuple[float, float]:
        """Minimum and maximum cost that a plan can remove if it removes these groups."""
        gone, bounds = self._saved_by_groups(groups), self._ffn_bounds(groups)
        low, high = (self._unit * sum(self._saved(i, bound[end]) for i, bound in enumerate(bounds)) for end in (0, 1))
        return gone + low, gone + high

    def _reachable(self) -> tuple[float, float]:
        (least, _), (_, most) = self._removed([0] * self.shape.num_layers), self._removed(self._group_limits)
        return least / self.costs.prunable, most / self.costs.prunable

    def _project_tied(self, rates: Sequence[float], free: Sequence[bool]) -> Rates:
        """Shift the layers' tied rates to mean β, then let the FFN of each layer compensate for its rounded groups."""
        dense = self.shape.dense.layers
        weights = [self.shape.layer_weights(w) for w in dense]
        bounds = [(self.p_min * n, self.p_max * n) for n in weights]
        proposed = [r * n for r, n in zip(rates, weights, strict=True)]
        shifted = shift_to_sum(proposed, freed(bounds, proposed, free), self.share * sum(weights))
        attention = [removed / n for removed, n in zip(shifted, weights, strict=True)]
        groups = self._round_groups(attention)
        ffn = [
            (removed - g * self.shape.group_weights) / (w.intermediate_size * self.shape.unit_weights)
            for removed, g, w in zip(shifted, groups, dense, strict=True)
        ]
        return Rates(tuple(attention), tuple(ffn))

    def _round_groups(self, rates: Sequence[float]) -> list[int]:
        """Number of groups to remove per layer, corrected if the FFN alone cannot meet β."""
        dense, limits = self.shape.dense.layers, self._group_limits
        heads = [r * w.num_key_value_heads for r, w in zip(rates, dense, strict=True)]
        step = self.kv_multiple
        groups = [min(max(step * math.floor(x / step + 0.5), 0), most) for x, most in zip(heads, limits, strict=True)]
        low, high = (share * self.costs.prunable for share in self._accepted)
        while self._removed(groups)[1] < low:
            layer = max((i for i, g in enumerate(groups) if g < limits[i]), key=lambda i: heads[i] - groups[i])
            groups[layer] += step
        while self._removed(groups)[0] > high:
            layer = min((i for i, g in enumerate(groups) if g > 0), key=lambda i: heads[i] - groups[i])
            if self.target and self._removed([g - step * (i == layer) for i, g in enumerate(groups)])[1] < low:
                break
            groups[layer] -= step
        return groups


def _differing(rates: Rates, parent: Rates) -> list[bool]:
    """One flag per layer: whether its rates differ from the parent's."""
    pairs = zip(rates.attention, rates.ffn, parent.attention, parent.ffn, strict=True)
    return [(a, f) != (old_a, old_f) for a, f, old_a, old_f in pairs]
