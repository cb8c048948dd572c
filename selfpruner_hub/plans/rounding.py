"""Move and round numbers so that they save a total: the steps of the projection onto a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Saved = Callable[[int, float], float]
"""(layer, units removed) → what that saves; it never falls as the units rise."""

EXACT = 1e-6
"""Units that sums of savings may be off by."""


def _itself(_layer: int, units: float) -> float:
    return units


def clipped(rates: Sequence[float]) -> tuple[float, ...]:
    """Limit rates to [-1, 2], so that extreme values act like values just outside [0, 1]."""
    return tuple(min(max(rate, -1.0), 2.0) for rate in rates)


def freed(
    bounds: Sequence[tuple[float, float]], values: Sequence[float], free: Sequence[bool]
) -> list[tuple[float, float]]:
    """The given bounds for layers that are free to move; for the others, bounds that fix their values."""
    return [bound if moves else (value, value) for bound, value, moves in zip(bounds, values, free, strict=True)]


def shift_to_sum(
    values: Sequence[float], bounds: Sequence[tuple[float, float]], total: float, saved: Saved = _itself
) -> list[float]:
    """Shift all values by one t, within their bounds, until they save the total: clip(values + t).

    Where each unit saves 1, this is the Euclidean projection onto {x : low <= x <= high, Σ x = total}.
    """

    def clipped(shift: float) -> list[float]:
        return [min(max(v + shift, low), high) for v, (low, high) in zip(values, bounds, strict=True)]

    low = min(b[0] - v for v, b in zip(values, bounds, strict=True))
    high = max(b[1] - v for v, b in zip(values, bounds, strict=True))
    for _ in range(200):
        middle = (low + high) / 2
        if sum(saved(layer, x) for layer, x in enumerate(clipped(middle))) < total:
            low = middle
        else:
            high = middle
    return clipped(high)


def largest_remainder(
    values: Sequence[float],
    bounds: Sequence[tuple[int, int]],
    total: float,
    saved: Saved = _itself,
    *,
    reached: bool = False,
) -> list[int]:
    """Round to integers within bounds that save as nearly the total as possible; the largest remainders round up.

    With `reached`, they save no less than the total, if their bounds allow it.
    """
    units = [min(max(math.floor(v + 1e-9), low), high) for v, (low, high) in zip(values, bounds, strict=True)]
    missing = (total if reached else round(total)) - sum(saved(layer, u) for layer, u in enumerate(units))
    while missing:
        step = 1 if missing > 0 else -1
        open_layers = [i for i, u in enumerate(units) if bounds[i][0] <= u + step <= bounds[i][1]]
        by_remainder = sorted(open_layers, key=lambda i: step * (values[i] - units[i]), reverse=True)
        before = list(units)
        for layer in by_remainder:
            change = saved(layer, units[layer] + step) - saved(layer, units[layer])
            # a step that saves nothing may lead to one that does
            if abs(missing) > 0.5 if not change else abs(missing - change) < abs(missing):
                units[layer] += step
                missing -= change
        if units == before:
            break
    while reached and missing > EXACT:
        open_layers = [i for i, u in enumerate(units) if u < bounds[i][1]]
        if not open_layers:
            break
        gains = {i: saved(i, units[i] + 1) - saved(i, units[i]) for i in open_layers}
        layer = max(open_layers, key=lambda i: (gains[i] > 0, values[i] - units[i]))
        units[layer] += 1
        missing -= gains[layer]
    return units
