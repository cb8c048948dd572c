"""Moves: small changes of a plan that lower its loss together, as their measured effects say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.predicted_loss import STEP, StepEffects, step_channels


def paying_moves(effects: StepEffects, budget: Budget) -> dict[str, list[int]]:
    """Select steps that together lower the loss: restored parts save more loss than the removed parts cost.

    Steps are taken in order of the loss per cost that they save or take, until the two prices meet. Parts that cost
    nothing stay as they are. This is a knapsack over one step of every part, around the plan where the effects were
    measured.

    Args:
        effects: Predicted changes of the loss.
        budget: Budget, whose costs are those of the parts; `kv_multiple` KV groups are a step of an attention.

    Returns:
        Indices of the layers to change (from 0), by field of `StepEffects`, best first. Each part of a layer is either
        removed or restored, not both.
    """
    costs = budget.costs
    sizes = {
        "attention": [budget.kv_multiple * costs.group(layer) for layer in range(len(costs.attention))],
        "ffn": [step_channels(len(t) - 1) * costs.channel(layer) for layer, t in enumerate(costs.ffn)],
    }
    ranked: dict[str, list[tuple[float, str, int]]] = {"removed": [], "restored": []}
    for name, changes in vars(effects).items():
        part, _, way = name.partition("_")
        sign = 1 if way == "removed" else -1
        finite = [(i, c) for i, c in enumerate(changes) if math.isfinite(c) and sizes[part][i]]
        ranked[way] += [(sign * c / sizes[part][i], part, i) for i, c in finite]
    removed, restored = sorted(ranked["removed"]), sorted(ranked["restored"], reverse=True)
    layers: dict[str, list[int]] = {name: [] for name in vars(effects)}
    taken: set[tuple[str, int]] = set()
    spare = 0.0  # cost removed and not yet restored; if negative, cost that is still to be removed
    cost = gain = 0.0  # loss per cost of the steps that were taken last
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
        layers[f"{part}_{way}"].append(layer)
        spare += sign * sizes[part][layer]
    return layers


def moved(
    rates: Rates, moves: Mapping[str, Sequence[int]], budget: Budget, share: float = 1.0, reach: float = 1.0
) -> Rates:
    """Make the first of some moves.

    Args:
        rates: Rates of the plan where the effects were measured.
        moves: Result of `paying_moves`.
        budget: Parameter budget, whose projection makes the sum of the new rates exact.
        share: Share of the moves of each kind to make, in (0, 1], best first.
        reach: Change of an FFN's rate, in steps of `predicted_loss.STEP`; an attention changes by `kv_multiple`
            KV groups.

    Returns:
        The new rates.
    """
    attention, ffn = [*rates.attention], [*rates.ffn]
    for name, layers in moves.items():
        part, _, way = name.partition("_")
        sign = 1 if way == "removed" else -1
        for layer in layers[: math.ceil(share * len(layers))]:
            if part == "ffn":
                ffn[layer] += sign * reach * STEP
            else:
                attention[layer] += sign * budget.kv_multiple / budget.shape.dense.layers[layer].num_key_value_heads
    return Rates.tied(ffn) if budget.tied else Rates(tuple(attention), tuple(ffn))
