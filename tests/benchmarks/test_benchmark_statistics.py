"""What benchmarks conclude from their rows."""

from __future__ import annotations

import pytest
import torch
from excess import in_order, remains
from fitness import disagreements
from starts import halfway, threshold
from support.tiny import tiny_model

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import ParameterBudget, Rates


def test_pairs_on_which_two_fitnesses_are_most_at_odds():
    """Each plan once, the one that KL prefers first; plans on which they agree are in no pair."""
    losses = [(0.0, 0.0), (1.0, 3.0), (2.0, 2.0), (3.0, 1.0), (4.0, 4.0)]
    rows = [{"kl": kl, "nats": nats} for kl, nats in losses]
    assert disagreements(rows) == [(1, 3)]
    far = [{"kl": kl, "nats": nats} for kl, nats in [*losses, (10.0, 21.0), (11.0, 20.0)]]
    assert disagreements(far) == [(1, 3), (5, 6)]
    agreed = [{"kl": kl, "nats": kl} for kl in (1.0, 2.0, 3.0)]
    assert disagreements(agreed) == []


def test_what_a_repair_leaves_and_what_orders_plans_for_it():
    """Plans whose second loss is the predicted one and a quarter of what the first has beyond it."""
    pairs = [(1.0, 2.0), (1.2, 1.6), (1.4, 1.9)]
    rows = [{"predicted": p, "first_text": f, "second_text": p + 0.25 * (f - p)} for p, f in pairs]
    assert remains(rows, "text") == pytest.approx(0.25)
    assert in_order(rows, "text", 0.25) == "3 of 3"
    assert in_order(rows, "text", 1.0) == "1 of 3"


def test_one_threshold_cuts_where_scores_are_least():
    budget = ParameterBudget(shape_of(tiny_model("llama").config), 0.3)
    shape = budget.shape
    widths = [w.intermediate_size for w in shape.dense.layers]
    scores = [torch.rand(width, generator=torch.Generator().manual_seed(0)) for width in widths]
    scores[-1] += 10  # nothing of the last layer goes
    rates = threshold(budget, scores)
    cut = round(0.3 * shape.weights(shape.dense) / shape.channel_weights)
    assert rates.ffn[-1] == 0
    assert sum(r * w for r, w in zip(rates.ffn, widths, strict=True)) == pytest.approx(cut)


def test_half_way_between_two_plans():
    budget = ParameterBudget(shape_of(tiny_model("llama").config), 0.3)
    layers = budget.shape.num_layers
    flat, ramp = Rates((0.0,) * layers, (0.3,) * layers), Rates((0.0,) * layers, (0.2, *(0.4,) * (layers - 1)))
    middle = halfway(budget, flat, ramp)
    ends = [budget.rates(budget.project(rates)).ffn for rates in (flat, ramp)]
    assert middle.ffn == pytest.approx([sum(pair) / 2 for pair in zip(*ends, strict=True)])
