"""Which small changes pay together."""

import math
import random

import pytest

from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.moves import paying_moves
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects, step_channels

SHAPE = ModelShape(hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([40] * 3, [3] * 3))
"""A KV group has 384 weights, a step of an FFN 96."""
BUDGET = Budget(SHAPE, 0.3)
NEVER = (math.inf,) * 3


def test_a_cheap_part_makes_room_for_a_dear_one():
    slopes = StepEffects(NEVER, NEVER, (0.3, 0.1, 0.9), (-0.05, -0.02, -0.5))
    assert paying_moves(slopes, BUDGET) == {
        "attention_removed": [],
        "attention_restored": [],
        "ffn_removed": [1],
        "ffn_restored": [2],
    }


def test_a_group_is_paid_for_by_as_many_steps_as_it_weighs():
    steps = SHAPE.group_weights // (step_channels(40) * SHAPE.unit_weights)
    wide = ModelShape(16, 4, 2, Plan.of([40] * 9, [3] * 9))
    slopes = StepEffects((math.inf,) * 9, (-9.0, *[math.inf] * 8), (math.inf, *[0.1] * 8), (0.0,) * 9)
    found = paying_moves(slopes, Budget(wide, 0.3))
    assert found["attention_restored"] == [0]
    assert found["ffn_removed"] == list(range(1, 1 + steps))
    assert steps == 4


def test_a_step_of_two_groups_weighs_as_much_as_both():
    wide = ModelShape(16, 4, 2, Plan.of([40] * 9, [4] * 9))
    slopes = StepEffects((math.inf,) * 9, (-9.0, *[math.inf] * 8), (math.inf, *[0.1] * 8), (0.0,) * 9)
    assert paying_moves(slopes, Budget(wide, 0.3, kv_multiple=2))["ffn_removed"] == list(range(1, 9))


def test_nothing_pays_where_a_plan_is_settled():
    assert not any(paying_moves(StepEffects(NEVER, NEVER, (0.3,) * 3, (-0.3,) * 3), BUDGET).values())
    assert not any(paying_moves(StepEffects(NEVER, NEVER, NEVER, NEVER), BUDGET).values())


@pytest.mark.parametrize("seed", range(20))
def test_no_removal_costs_more_a_weight_than_what_comes_back_gains(seed):
    rng = random.Random(seed)
    values = [tuple(sign * rng.random() for _ in range(3)) for sign in (1, -1, 1, -1)]
    slopes = StepEffects(*values)
    found = paying_moves(slopes, BUDGET)
    sizes = {"attention": SHAPE.group_weights, "ffn": step_channels(40) * SHAPE.unit_weights}
    prices = {
        way: [
            abs(getattr(slopes, name)[i]) / sizes[name.split("_")[0]]
            for name in found
            if way in name
            for i in found[name]
        ]
        for way in ("removed", "restored")
    }
    assert max(prices["removed"], default=0) <= min(prices["restored"], default=math.inf)
    for part in ("attention", "ffn"):  # one way only
        assert not set(found[f"{part}_removed"]) & set(found[f"{part}_restored"])
