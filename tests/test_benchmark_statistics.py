"""What benchmarks conclude from their rows."""

from __future__ import annotations

import pytest
from excess import in_order, remains
from fitness import disagreements


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
