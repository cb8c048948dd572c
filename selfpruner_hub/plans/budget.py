"""Turn rates into plans; every plan from this module removes the fraction β of the prunable weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from selfpruner_hub.errors import BudgetError
from selfpruner_hub.plans.plan import ModelShape, Plan

TOLERANCE = 1e-3
"""Maximum difference between the requested and the achieved β, if the granularity of the model allows it."""


@dataclass(frozen=True)
class Rates:
    """A proposal: the fractions of its KV groups and of its FFN channels that each layer loses.

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
class ParameterBudget:
    """The constraint of the search: mean rate β, bounds on each rate, granularity of the widths.

    Args:
        shape: Geometry of the dense model.
        beta: Fraction of all prunable weights to remove, 0 < β < 1.
        p_min: Minimum rate of any layer, in [0, β].
        p_max: Maximum rate of any layer's attention or FFN (of the whole layer if they are tied), in [β, 1). Every
            layer keeps at least one KV group.
        tied: Whether attention and FFN of a layer share one rate (arXiv 2502.14413) instead of two.
        multiple_of: Number of channels that every FFN width is a multiple of (32, 64 or 128 suit most hardware); it
            must divide the dense width. Coarser widths lose a little quality, and make β less exact in small models.
        kv_multiple: Number of KV groups that the groups of every layer are a multiple of, such as the size of tensor
            parallelism; it must divide the dense number of every layer.

    Raises:
        BudgetError: A value is out of its range, or β cannot be reached within the bounds.
    """

    shape: ModelShape
    beta: float
    p_min: float = 0.0
    p_max: float = 0.9
    tied: bool = False
    multiple_of: int = 1
    kv_multiple: int = 1

    def __post_init__(self) -> None:
        """Check every value, and whether β can be reached."""
        check_beta(self.beta)
        if not 0 <= self.p_min < self.p_max < 1:
            raise BudgetError(f"Rate bounds must satisfy 0 <= p_min < p_max < 1; got {self.p_min} and {self.p_max}.")
        self._check_multiples()
        least, most = self._reachable()
        if not least - self.tolerance <= self.beta <= most + self.tolerance:
            least_kept = "all" if self.shape.whole_attention else f"at least {self.kv_multiple}"
            raise BudgetError(
                f"beta={self.beta:g} cannot be reached: with rates in [{self.p_min:g}, {self.p_max:g}] and "
                f"{least_kept} of its KV heads in each layer, this model can lose between {least:.3f} and {most:.3f}.",
                "Change beta or the bounds.",
            )
        nearest = self.shape.beta(self.project(Rates.tied([self.beta] * self.shape.num_layers)))
        if abs(nearest - self.beta) > self.tolerance + 1e-12:
            raise BudgetError(
                f"beta={self.beta:g} cannot be reached: it lies between two KV groups, where the FFN cannot reach; "
                f"the nearest is {nearest:.3f}.",
                "Change beta or the bounds.",
            )

    @property
    def tolerance(self) -> float:
        """Maximum accepted difference from β: 0.001, or half the model's smallest step if that is larger."""
        step = self.multiple_of * self.shape.channel_weights / self.shape.weights(self.shape.dense)
        return max(TOLERANCE, step / 2 + 1e-9)

    def rates(self, plan: Plan) -> Rates:
        """The rates of `plan`: separate for attention and FFN, or one per layer if they are tied."""
        if self.tied:
            return Rates.tied(self.shape.rates(plan))
        pairs = tuple(zip(plan.layers, self.shape.dense.layers, strict=True))
        return Rates(
            tuple(1 - kept.num_key_value_heads / dense.num_key_value_heads for kept, dense in pairs),
            tuple(1 - kept.intermediate_size / dense.intermediate_size for kept, dense in pairs),
        )

    def distance(self, rates: Rates, plan: Plan) -> float:
        """Distance between a proposal and its projection: the mean absolute difference over all rates."""
        own = self.rates(plan)
        moved = [abs(a - b) for a, b in zip(rates.attention + rates.ffn, own.attention + own.ffn, strict=True)]
        return sum(moved) / len(moved)

    def project(self, rates: Rates, parent: Rates | None = None) -> Plan:
        """Move a proposal to the nearest plan on the budget.

        The proposed numbers of KV groups are rounded first, because one group is a large share of a layer. Then one
        constant, the same for all layers, shifts the FFN rates within their bounds until the total is met (Euclidean
        projection onto the budget), and they are rounded by largest remainder. The numbers of groups change further
        only if the FFN alone cannot meet β.

        Args:
            rates: `L` attention rates and `L` FFN rates; any finite numbers.
            parent: Rates of the plan that the proposal changes: only the layers that differ from it are shifted, if
                their bounds allow it. So the child stays near its parent, and its layers before the first changed one
                are the same. None shifts all layers.

        Returns:
            A plan whose β is within `tolerance` of the requested β.

        Raises:
            BudgetError: The number of rates is not `L`, or a rate is not finite.
        """
        self._check(rates)
        rates = Rates(_clipped(rates.attention), _clipped(rates.ffn))
        dense = self.shape.dense.layers
        free = [True] * len(dense) if parent is None else _differing(rates, parent)
        if self.tied:
            rates = self._project_tied(rates.ffn, free)
        groups = self._round_groups(rates.attention)
        removed = self.beta * self.shape.weights(self.shape.dense)
        for_ffn = removed - sum(groups) * self.shape.group_weights
        bounds = self._ffn_bounds(groups)
        unit = self.multiple_of * self.shape.channel_weights
        wanted = [rate * w.intermediate_size / self.multiple_of for rate, w in zip(rates.ffn, dense, strict=True)]
        shifted = _shift_to_sum(wanted, _freed(bounds, wanted, free), for_ffn / unit)
        units = _largest_remainder(shifted, bounds, for_ffn / unit)
        return Plan.of(
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
        """Bounds on the units of `multiple_of` channels that each layer loses besides its groups; one unit is kept.

        p_min bounds the rate of the layer. p_max bounds the rate of the layer if attention and FFN are tied, and the
        rate of the FFN otherwise.
        """
        bounds = []
        unit = self.multiple_of * self.shape.channel_weights
        for w, removed_groups in zip(self.shape.dense.layers, groups, strict=True):
            units, gone = w.intermediate_size // self.multiple_of, removed_groups * self.shape.group_weights
            size = self.shape.layer_weights(w)
            low = math.ceil((self.p_min * size - gone) / unit - 1e-9)
            high = math.floor((self.p_max * size - gone) / unit + 1e-9 if self.tied else self.p_max * units + 1e-9)
            bounds.append((min(max(low, 0), units - 1), min(high, units - 1)))
        return bounds

    def _group_limit(self, groups: int) -> int:
        """Maximum number of KV groups that a layer with `groups` of them loses."""
        if self.shape.whole_attention:
            return 0
        units = groups // self.kv_multiple
        return self.kv_multiple * min(math.floor(self.p_max * units + 1e-9), units - 1)

    def _removed(self, groups: Sequence[int]) -> tuple[int, int]:
        """Minimum and maximum number of weights that a plan can remove if it removes these groups."""
        bounds = self._ffn_bounds(groups)
        unit = self.multiple_of * self.shape.channel_weights
        gone = sum(groups) * self.shape.group_weights
        return gone + unit * sum(low for low, _ in bounds), gone + unit * sum(high for _, high in bounds)

    def _reachable(self) -> tuple[float, float]:
        limits = [self._group_limit(w.num_key_value_heads) for w in self.shape.dense.layers]
        total = self.shape.weights(self.shape.dense)
        return self._removed([0] * len(limits))[0] / total, self._removed(limits)[1] / total

    def _project_tied(self, rates: Sequence[float], free: Sequence[bool]) -> Rates:
        """Shift the layers' tied rates to mean β, then let the FFN of each layer compensate for its rounded groups."""
        dense = self.shape.dense.layers
        weights = [self.shape.layer_weights(w) for w in dense]
        bounds = [(self.p_min * n, self.p_max * n) for n in weights]
        total = self.beta * sum(weights)
        wanted = [r * n for r, n in zip(rates, weights, strict=True)]
        shifted = _shift_to_sum(wanted, _freed(bounds, wanted, free), total)
        attention = [removed / n for removed, n in zip(shifted, weights, strict=True)]
        groups = self._round_groups(attention)
        ffn = [
            (removed - g * self.shape.group_weights) / (w.intermediate_size * self.shape.channel_weights)
            for removed, g, w in zip(shifted, groups, dense, strict=True)
        ]
        return Rates(tuple(attention), tuple(ffn))

    def _round_groups(self, rates: Sequence[float]) -> list[int]:
        """Number of groups to remove per layer, corrected if the FFN alone cannot meet β."""
        dense = self.shape.dense.layers
        limits = [self._group_limit(w.num_key_value_heads) for w in dense]
        wanted = [r * w.num_key_value_heads for r, w in zip(rates, dense, strict=True)]
        step = self.kv_multiple
        nearest = [step * math.floor(x / step + 0.5) for x in wanted]
        groups = [min(max(g, 0), limit) for g, limit in zip(nearest, limits, strict=True)]
        target = self.beta * self.shape.weights(self.shape.dense)
        slack = self.tolerance * self.shape.weights(self.shape.dense)
        while self._removed(groups)[1] < target - slack:
            layer = max((i for i, g in enumerate(groups) if g < limits[i]), key=lambda i: wanted[i] - groups[i])
            groups[layer] += step
        while self._removed(groups)[0] > target + slack:
            layer = min((i for i, g in enumerate(groups) if g > 0), key=lambda i: wanted[i] - groups[i])
            groups[layer] -= step
        return groups


def check_beta(beta: object) -> None:
    """Raise `BudgetError` unless β is a number with 0 < β < 1."""
    if isinstance(beta, bool) or not isinstance(beta, (int, float)):
        raise BudgetError(f"beta must be a number between 0 and 1; got {beta!r}.", "Pass for example beta=0.3.")
    if not 0 < beta < 1:
        raise BudgetError(
            f"beta must satisfy 0 < beta < 1; got {beta:g}.", "It is the mean fraction of weights removed."
        )


def _clipped(rates: Sequence[float]) -> tuple[float, ...]:
    """Limit rates to [-1, 2], so that extreme values act like values just outside [0, 1]."""
    return tuple(min(max(rate, -1.0), 2.0) for rate in rates)


def _differing(rates: Rates, parent: Rates) -> list[bool]:
    """One flag per layer: whether its rates differ from the parent's."""
    pairs = zip(rates.attention, rates.ffn, parent.attention, parent.ffn, strict=True)
    return [(a, f) != (old_a, old_f) for a, f, old_a, old_f in pairs]


def _freed(
    bounds: Sequence[tuple[float, float]], values: Sequence[float], free: Sequence[bool]
) -> list[tuple[float, float]]:
    """The given bounds for layers that are free to move; for the others, bounds that fix their values."""
    return [bound if moves else (value, value) for bound, value, moves in zip(bounds, values, free, strict=True)]


def _shift_to_sum(values: Sequence[float], bounds: Sequence[tuple[float, float]], total: float) -> list[float]:
    """Euclidean projection of `values` onto {x : low <= x <= high, Σ x = total}: clip(values + t) for one t."""

    def clipped(shift: float) -> list[float]:
        return [min(max(v + shift, low), high) for v, (low, high) in zip(values, bounds, strict=True)]

    low = min(b[0] - v for v, b in zip(values, bounds, strict=True))
    high = max(b[1] - v for v, b in zip(values, bounds, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        if sum(clipped(middle)) < total:
            low = middle
        else:
            high = middle
    return clipped(high)


def _largest_remainder(values: Sequence[float], bounds: Sequence[tuple[int, int]], total: float) -> list[int]:
    """Round to integers within bounds, with a sum as near to `total` as possible; the largest remainders round up."""
    units = [min(max(math.floor(v + 1e-9), low), high) for v, (low, high) in zip(values, bounds, strict=True)]
    missing = round(total) - sum(units)
    while missing:
        step = 1 if missing > 0 else -1
        open_layers = [i for i, u in enumerate(units) if bounds[i][0] <= u + step <= bounds[i][1]]
        if not open_layers:
            break
        by_remainder = sorted(open_layers, key=lambda i: step * (values[i] - units[i]), reverse=True)
        for layer in by_remainder[: abs(missing)]:
            units[layer] += step
            missing -= step
    return units
