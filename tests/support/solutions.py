"""Scored plans of a model of three layers, for tests of prompts and replies."""

from __future__ import annotations

import math
import random

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.proposers import Scored

LAYERS = 3
SHAPE = ModelShape(hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([32] * LAYERS, [3] * LAYERS))
UNTIED, TIED = Budget(SHAPE, 0.3), Budget(SHAPE, 0.3, tied=True)
SLOPES = StepEffects((0.9, math.inf, 0.8), (-0.1, math.inf, -0.7), (0.2, 0.01, 0.03), (-0.01, -0.002, -0.02))
"""A KV group has 384 weights, a step of an FFN 96: layer 3 wants its group back, FFN 2 and 3 cost little."""


def history(budget: Budget, size: int) -> list[Scored]:
    """Random plans on the budget, best first."""
    rng = random.Random(5)
    plans = [budget.project(Rates.tied([rng.random() for _ in range(LAYERS)])) for _ in range(size)]
    return [Scored(plan, budget.rates(plan), 1.5 + rank, 1.0, "random", 1) for rank, plan in enumerate(plans)]
