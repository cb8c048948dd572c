"""The two classical proposers: their rates are finite and in range, and children come from their parents."""

from dataclasses import replace

import numpy as np
import pytest

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.search.llm import reply_schema
from selfpruner_hub.search.llm.question import Question
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer, Scored, random_rates
from selfpruner_hub.search.slopes import SlopesProposer

SHAPE = ModelShape(hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([32] * 6, [4, 2, 3, 1, 4, 4]))
ELITE = 5


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def budget(request):
    return Budget(SHAPE, 0.4, tied=request.param)


def history(budget, size):
    """Random plans on the budget, best first."""
    rng = np.random.default_rng(7)
    plans = [budget.project(random_rates(budget, rng)) for _ in range(size)]
    return [Scored(plan, budget.rates(plan), float(rank), 1.0, "random", 1) for rank, plan in enumerate(plans)]


def pairs(rates):
    return list(zip(rates.attention, rates.ffn, strict=True))


def ask(proposer, operation, shown, count=200, seed=0):
    return proposer.ask(operation, shown, count, np.random.default_rng(seed))


def test_random_rates_lie_in_range(budget):
    proposals = ask(RandomProposer(budget), "mutation", [])
    assert len({p.rates for p in proposals}) == 200
    for rates in (p.rates for p in proposals):
        assert len(rates.attention) == len(rates.ffn) == 6
        assert all(0.4 * 0.4 <= r <= 1.6 * 0.4 for r in rates.ffn)
        if budget.tied:
            assert rates.attention == rates.ffn
        else:
            dense = SHAPE.dense.layers
            assert all(a in (0, 1 / w.num_key_value_heads) for a, w in zip(rates.attention, dense, strict=True))


def test_random_rates_never_leave_zero_to_one():
    budget = Budget(SHAPE, 0.7)  # 1.6 β would be 1.12
    drawn = [r for p in ask(RandomProposer(budget), "initial", []) for r in p.rates.ffn]
    assert max(drawn) == 1
    assert min(drawn) >= 0.28


def test_random_attention_gives_up_a_group_with_probability_half_beta():
    drawn = [r > 0 for p in ask(RandomProposer(Budget(SHAPE, 0.4)), "initial", []) for r in p.rates.attention]
    assert np.mean(drawn) == pytest.approx(0.2, abs=0.04)


@pytest.mark.parametrize("operation", ["initial", "crossover", "mutation"])
@pytest.mark.parametrize("size", [0, 1, 2, 20])
def test_children_of_evolution_are_finite_and_in_range(budget, operation, size):
    shown = history(budget, size)
    children = ask(EvolutionProposer(budget, ELITE), operation, shown)
    assert len(children) == 200
    for child in children:
        assert all(np.isfinite(r) and 0 <= r <= 1 for r in child.rates.attention + child.rates.ffn)
        assert all(0 <= p < min(size, ELITE) for p in child.parents)
        budget.project(child.rates)


@pytest.mark.parametrize("proposer", [RandomProposer, EvolutionProposer])
@pytest.mark.parametrize("operation", ["initial", "crossover", "mutation"])
def test_the_same_random_state_gives_the_same_answer(budget, proposer, operation):
    shown = history(budget, 9)
    first, again, other = (ask(proposer(budget), operation, shown, 4, seed) for seed in (1, 1, 2))
    assert first == again != other


def test_crossover_mixes_the_parents_layer_by_layer(budget):
    shown = history(budget, 9)
    children = ask(EvolutionProposer(budget, ELITE), "crossover", shown)
    for child in children:
        first, second = child.parents
        assert first != second
        parents = zip(pairs(shown[first].rates), pairs(shown[second].rates), strict=True)
        assert all(own in either for own, either in zip(pairs(child.rates), parents, strict=True))
    assert {p for child in children for p in child.parents} == set(range(ELITE))
    assert any(c.rates not in (shown[c.parents[0]].rates, shown[c.parents[1]].rates) for c in children)


def test_the_better_of_two_is_picked_as_first_parent_more_often(budget):
    children = ask(EvolutionProposer(budget, ELITE), "mutation", history(budget, 9), 500)
    picked = np.bincount([c.parents[0] for c in children], minlength=ELITE)
    assert picked[0] > 2 * picked[-1] > 0


def test_mutation_changes_a_few_layers_of_one_parent():
    budget = Budget(SHAPE, 0.4)
    shown = history(budget, 9)
    changed = []
    for child in ask(EvolutionProposer(budget, ELITE), "mutation", shown):
        (parent,) = child.parents
        own, old = pairs(child.rates), pairs(shown[parent].rates)
        changed.append(sum(a != b for a, b in zip(own, old, strict=True)))
        groups = np.subtract(child.rates.attention, shown[parent].rates.attention)
        assert np.count_nonzero(groups) <= 1
    assert np.mean([1 <= c <= 5 for c in changed]) > 0.8


def test_where_channels_cost_nothing_groups_move():
    costs = Costs.linear(SHAPE, 1.0, 0.0, unit="bytes")
    budget = Budget.for_target(SHAPE, costs, target_of({"kv_cache": 0.6}, "torch"))
    shown, changed = history(budget, 9), []
    for child in ask(EvolutionProposer(budget), "mutation", shown):
        parent = shown[child.parents[0]]
        assert child.rates.ffn == parent.rates.ffn
        changed.append(budget.project(child.rates, parent.rates) != parent.plan)
    assert np.mean(changed) > 0.8


@pytest.mark.parametrize("proposer", [RandomProposer, EvolutionProposer, SlopesProposer])
def test_attention_changes_by_multiples(proposer):
    """Of two KV groups here: of one, rounding would make none or two."""
    shape = replace(SHAPE, dense=Plan.of([32] * 6, [4] * 6))
    budget = Budget(shape, 0.4, kv_multiple=2)
    slopes = StepEffects((0.1,) * 6, (-0.2,) * 6, (0.3,) * 6, (-0.1,) * 6)
    shown = [replace(history(budget, 1)[0], slopes=slopes)]
    children = ask(proposer(budget), "mutation", shown, 20)
    reply = '{"parents": [1], "attention": {"more": [1, 2, 3], "less": [4, 5, 6]}, "ffn": {}}'
    children.append(reply_schema.proposal(Question("mutation", shown, budget), "", reply, 0))
    rates = {rate for child in children for rate in child.rates.attention}
    assert len(rates) > 1
    assert all((2 * rate).is_integer() for rate in rates)
    assert reply_schema.schema(Question("initial", [], budget))["properties"]["attention"]["items"] == {"enum": [0, 50]}


def test_a_tied_mutation_stays_tied():
    budget = Budget(SHAPE, 0.4, tied=True)
    for child in ask(EvolutionProposer(budget), "mutation", history(budget, 9)):
        assert child.rates == Rates.tied(child.rates.ffn)


def test_fresh_members_do_not_depend_on_history(budget):
    proposer = EvolutionProposer(budget)
    assert ask(proposer, "initial", history(budget, 9)) == ask(proposer, "initial", [])
