"""Seed plans of a search: uniform rates, a ramp over depth, and rates from predicted and measured losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.moves import moved, paying_moves
from selfpruner_hub.plans.plan import Plan, removed_rate
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects

RAMP = 0.5
"""Slope of the ramp: the last layer loses (1 + RAMP) β, the first (1 - RAMP) β (arithmetic progression: ATP,
arXiv 2502.10184)."""
SHARES = (0.25, 0.5, 1.0)
"""Shares of the paying moves that are tried for the seed `refined`: how far the measured effects hold is not known."""


def seeds(
    budget: Budget,
    curves: Sequence[LossCurves] | None = None,
    loss: Callable[[Plan], float] | None = None,
    effects: Callable[[Plan], StepEffects] | None = None,
) -> dict[str, Rates]:
    """Compute the seed plans, simplest first.

    Args:
        budget: Budget of the search.
        curves: Predicted losses of the layers alone, for the seeds `sensitivity` and `blend`; None leaves these out.
        loss: Function that measures the loss of a plan above the dense model's, in nats per token, to scale the curves;
            None leaves the curves unscaled.
        effects: Function that measures the effects of small changes of a plan, for the seed `refined`, which needs
            `loss` too; None leaves it out.

    Returns:
        Rates for `budget.project`, by the name of the seed.
    """
    layers = budget.shape.num_layers
    depth = np.linspace(-1, 1, layers) if layers > 1 else np.zeros(1)
    flat = np.full(layers, budget.share)
    rates = {"uniform": budget.spread(flat.tolist()), "ramp": budget.spread((flat * (1 + RAMP * depth)).tolist())}
    if curves is not None:
        best = knapsack(budget, curves if loss is None else _as_measured(budget, curves, loss))
        rates["sensitivity"] = best
        rates["blend"] = _blend(best, budget.rates(budget.project(rates["uniform"])))
        if loss is not None and effects is not None:
            rates["refined"] = refined(budget, budget.project(best), loss, effects)
    return rates


def _as_measured(budget: Budget, curves: Sequence[LossCurves], loss: Callable[[Plan], float]) -> list[LossCurves]:
    """Scale the curves of attention and those of the FFN to the measured loss of cutting only that part in all layers.

    The curves predict each layer alone, and the loss of all layers together can differ from their sum.
    """
    dense, plan = budget.shape.dense.layers, budget.project(knapsack(budget, curves))

    def factor(part: str, width: str) -> float:
        widths = [getattr(w, width) for w in plan.layers]
        predicted = sum(float(getattr(c, part)[k]) for c, k in zip(curves, widths, strict=True))
        if predicted <= 0:  # nothing of this part is cut
            return 1.0
        layers = tuple(replace(full, **{width: k}) for full, k in zip(dense, widths, strict=True))
        alone = replace(plan, layers=layers)
        ratio = loss(alone) / predicted
        return ratio if 0 < ratio < math.inf else 1.0

    attention, ffn = factor("attention", "num_key_value_heads"), factor("ffn", "intermediate_size")
    return [LossCurves(attention * c.attention, ffn * c.ffn) for c in curves]


def _blend(a: Rates, b: Rates) -> Rates:
    """FFN rates half-way between two proposals, with the attention rates of the first."""
    return Rates(a.attention, tuple((x + y) / 2 for x, y in zip(a.ffn, b.ffn, strict=True)))


def refined(budget: Budget, plan: Plan, loss: Callable[[Plan], float], effects: Callable[[Plan], StepEffects]) -> Rates:
    """Solve a knapsack over the measured effects of small changes of a plan, and make the best share of its moves.

    The effects know how the layers interact, which their predicted losses do not.

    Args:
        budget: Parameter budget of the search.
        plan: Plan to refine.
        loss: Function that measures the loss of a plan.
        effects: Function that measures the effects of small changes of a plan.

    Returns:
        Rates of the plan of least loss, among the given one and those after a share of the moves (`SHARES`).
    """
    moves = paying_moves(effects(plan), budget)
    tried = [budget.project(moved(budget.rates(plan), moves, budget, share)) for share in SHARES]
    return budget.rates(min((plan, *dict.fromkeys(tried)), key=loss))


def knapsack(budget: Budget, curves: Sequence[LossCurves]) -> Rates:
    """Find the rates of least total predicted loss: each part minimises loss + μ · cost, with μ by bisection.

    The layers' losses are assumed to add up; the search finds how they interact.
    """
    shape, costs = budget.shape, budget.costs
    target = (1 - budget.share) * costs.prunable
    losses = [c.attention for c in curves] + [c.ffn for c in curves]
    tables = (*costs.attention, *costs.ffn)
    least = [w.num_key_value_heads for w in shape.least] + [w.intermediate_size for w in shape.least]
    floors = [
        min(max(fewest, 1 + int((1 - budget.p_max) * (len(loss) - 1) - 1e-9)), len(loss) - 1)
        for loss, fewest in zip(losses, least, strict=True)
    ]
    if budget.whole_ffn:
        floors[len(curves) :] = [len(c.ffn) - 1 for c in curves]

    def widths_at(price: float) -> list[int]:
        return [
            floor + int(np.argmin(loss[floor:] + price * table[floor:]))
            for loss, table, floor in zip(losses, tables, floors, strict=True)
        ]

    units = [table[-1] / max(1, len(table) - 1) for table in tables]  # what a group or a channel costs, on average
    low, high = 0.0, max(float(loss.max() / unit) for loss, unit in zip(losses, units, strict=True) if unit) + 1e-12
    for _ in range(100):
        middle = (low + high) / 2
        cost = sum(float(table[k]) for k, table in zip(widths_at(middle), tables, strict=True))
        low, high = (middle, high) if cost > target else (low, middle)
    rates = [removed_rate(k, len(loss) - 1) for k, loss in zip(widths_at(high), losses, strict=True)]
    layers = shape.num_layers
    if budget.tied:
        sizes = [shape.layer_weights(w) for w in shape.dense.layers]
        removed = [
            rates[i] * w.num_key_value_heads * shape.group_weights
            + rates[layers + i] * w.intermediate_size * shape.unit_weights
            for i, w in enumerate(shape.dense.layers)
        ]
        return Rates.tied([r / n for r, n in zip(removed, sizes, strict=True)])
    return Rates(tuple(rates[:layers]), tuple(rates[layers:]))
