"""The proposer that follows slopes: it makes the moves that pay, finds an optimum, and needs no luck."""

import math
from dataclasses import replace

import numpy as np
import pytest

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer, Scored
from selfpruner_hub.search.slopes import SlopesProposer
from selfpruner_hub.settings import SearchSchedule

SHAPE = ModelShape(hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([64] * 6, [4] * 6))
COSTS = (1.0, 4.0, 2.0, 8.0, 1.0, 3.0)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def budget(request):
    return Budget(SHAPE, 0.4, tied=request.param)


def effects(ffn_removed, ffn_restored, attention_removed=(math.inf,) * 6, attention_restored=(math.inf,) * 6):
    return StepEffects(tuple(attention_removed), tuple(attention_restored), tuple(ffn_removed), tuple(ffn_restored))


def uniform(budget, slopes=None):
    rates = Rates.tied([0.4] * 6)
    plan = budget.project(rates)
    return Scored(plan, budget.rates(plan), 1.0, 1.0, "seed:uniform", 0, slopes)


def ask(budget, history, count=50, seed=0):
    return SlopesProposer(budget).ask("mutation", history, count, np.random.default_rng(seed))


def test_only_moves_that_pay_are_made():
    budget = Budget(SHAPE, 0.4)
    slopes = effects([0.1, 9, 5, 9, 5, 9], [-0.05, -4, -0.1, -0.2, -0.1, -0.2])
    scored = uniform(budget, slopes)
    for proposal in ask(budget, [scored]):
        moved = np.sign(np.subtract(proposal.rates.ffn, scored.rates.ffn))
        assert moved.tolist() == [1, -1, 0, 0, 0, 0]  # layer 1 pays for layer 2
        assert proposal.rates.attention == scored.rates.attention
        assert proposal.parents == (0,)
        assert budget.project(proposal.rates, scored.rates) != scored.plan


def test_attention_moves_by_whole_groups():
    budget = Budget(SHAPE, 0.4)
    removed, restored = [0.01, *[9.0] * 5], [-0.001, -0.001, -8, -0.001, -0.001, -0.001]
    scored = uniform(budget, effects([9.0] * 6, [-0.001] * 6, removed, restored))
    for proposal in ask(budget, [scored]):
        moved = np.subtract(proposal.rates.attention, scored.rates.attention)
        assert moved.tolist() == pytest.approx([0.25, 0, -0.25, 0, 0, 0])


def test_the_region_and_the_number_of_moves_vary():
    budget = Budget(SHAPE, 0.4)
    scored = uniform(budget, effects([0.1, 9, 0.2, 9, 0.3, 9], [-0.05, -4, -0.1, -5, -0.1, -6]))
    moved = [np.subtract(p.rates.ffn, scored.rates.ffn) for p in ask(budget, [scored])]
    steps = [np.abs(m).max() for m in moved]
    assert min(steps) < 0.02
    assert max(steps) > 0.08
    assert {int((m > 0).sum()) for m in moved} == {1, 2, 3}


def test_the_measured_plan_is_moved_wherever_it_stands(budget):
    other = replace(uniform(budget), fitness=0.5)
    measured = uniform(budget, effects([0.1, *[9.0] * 5], [-0.05, -4, *[-0.1] * 4]))
    assert {p.parents for p in ask(budget, [other, measured])} == {(1,)}


def test_nothing_is_proposed_where_no_move_pays(budget):
    assert ask(budget, [uniform(budget, effects([5.0] * 6, [-1.0] * 6))]) == []


def test_without_slopes_it_is_evolution(budget):
    history = [uniform(budget)]
    expected = EvolutionProposer(budget).ask("mutation", history, 5, np.random.default_rng(3))
    assert SlopesProposer(budget).ask("mutation", history, 5, np.random.default_rng(3)) == expected


def loss(plan, _share=1.0):
    """A separable loss with a known optimum: what a layer loses costs in proportion to its weight, more and more."""
    kept = [w.intermediate_size / 64 for w in plan.layers], [w.num_key_value_heads / 4 for w in plan.layers]
    return sum(c * ((1 - f) ** 2 + (1 - a) ** 2) for c, f, a in zip(COSTS, *kept, strict=True))


def measured(plan, _share):
    """The exact effect of every step on that loss."""
    found = {}
    for part, width, dense, step in (("attention", "num_key_value_heads", 4, 1), ("ffn", "intermediate_size", 64, 3)):
        for way, sign in (("removed", -1), ("restored", 1)):
            values = []
            for index, layer in enumerate(plan.layers):
                after = getattr(layer, width) + sign * step
                moved = [*plan.layers]
                moved[index] = replace(layer, **{width: min(max(after, 1), dense)})
                values.append(loss(Plan(tuple(moved))) - loss(plan) if 0 < after <= dense else math.inf)
            found[f"{part}_{way}"] = tuple(values)
    return StepEffects(**found)


def test_it_finds_more_than_evolution_and_chance_with_the_same_evaluations():
    budget = Budget(SHAPE, 0.4)
    schedule = SearchSchedule(evaluations=24, first_share=1.0, crossover=4, mutation=4)

    def best(kind, told=None):
        problem = Problem(budget, {"uniform": Rates.tied([0.4] * 6)}, loss, told)
        return search(kind(budget), problem, Journal(None, {}), schedule).best.fitness

    slopes = best(SlopesProposer, measured)
    assert slopes < 0.97 * best(EvolutionProposer)
    assert slopes < 0.97 * best(RandomProposer)
