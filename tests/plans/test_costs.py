"""A budget in milliseconds or bytes: every plan meets its target, whatever the costs of the widths look like."""

import hashlib
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from selfpruner_hub.errors import BudgetError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, Plan, widths_of
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.plans.seeds import knapsack, seeds
from selfpruner_hub.plans.target import target_of
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer, Scored

SHAPE = ModelShape(hidden_size=32, head_dim=8, queries_per_group=2, dense=Plan.of([96] * 6, [4] * 6))
SPEEDUP = target_of({"speedup": 1.25}, "onnx")
LINEAR = Costs.linear(SHAPE, group=5.0, channel=0.5, constant=100.0, unit="ms")


def tables(draw, width, layers):
    """A table a layer, or one for all: steps of any height, some of them flat."""
    steps = st.lists(st.floats(0, 1), min_size=width, max_size=width)
    found = [np.cumsum([0.0, *draw(steps)]) for _ in range(layers if draw(st.booleans()) else 1)]
    return tuple(found[i % len(found)] for i in range(layers))


@st.composite
def proposals(draw):
    layers = draw(st.integers(1, 6))
    shape = ModelShape(32, 8, 2, Plan.of([48] * layers, [4] * layers))
    costs = Costs(tables(draw, 4, layers), tables(draw, 48, layers), draw(st.floats(0, 50)), "ms")
    assume(costs.prunable > 1)
    target = target_of({"speedup": draw(st.floats(1.02, 2.5))}, "onnx")
    try:
        budget = Budget.for_target(shape, costs, target, multiple_of=draw(st.sampled_from([1, 8])))
    except BudgetError:
        assume(False)
    rates = st.lists(st.floats(-0.5, 1.5), min_size=layers, max_size=layers)
    return budget, Rates(tuple(draw(rates)), tuple(draw(rates)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(proposals())
def test_every_plan_costs_what_the_target_allows(proposal):
    budget, rates = proposal
    plan, costs = budget.project(rates), budget.costs
    highest = max(
        float(np.max(table[budget.multiple_of :] - table[: -budget.multiple_of])) for table in costs.ffn
    )  # of one unit of channels: nearer than half of it no plan may lie
    allowed = budget.tolerance * costs.prunable + highest
    assert abs(costs.of(plan) - budget.target.wanted(costs)) <= allowed + 1e-9
    assert all(w.intermediate_size % budget.multiple_of == 0 for w in plan.layers)


def test_parameters_are_the_case_of_linear_cost():
    scaled = Costs.linear(SHAPE, SHAPE.group_weights, SHAPE.unit_weights, unit="ms")
    beta = Budget(SHAPE, 0.3)
    aim = target_of({"speedup": 1 / 0.7}, "onnx")
    budget = Budget.for_target(SHAPE, scaled, aim)
    rates = Rates((0.0, 0.3, 0.5, 0.0, 0.9, 0.1), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6))
    assert budget.share == pytest.approx(0.3)
    assert budget.project(rates) == beta.project(rates)
    assert beta.costs.share(beta.project(rates)) == pytest.approx(0.3, abs=beta.tolerance)


def test_plans_of_beta_are_those_of_before_there_were_costs():
    """Of random budgets, proposals and curves, to the last bit: the hash was made when only weights were counted."""
    rng, found = random.Random(0), hashlib.sha256()
    for _ in range(60):
        layers, groups = rng.choice([1, 2, 6]), rng.choice([1, 3, 8])
        shape = ModelShape(rng.choice([64, 576]), 16, rng.choice([1, 3]), Plan.of([96] * layers, [groups] * layers))
        bounds = (rng.choice([0.0, 0.1]), 0.9, rng.random() < 0.3, rng.choice([1, 8, 32]))
        try:
            budget = Budget(shape, rng.uniform(0.05, 0.6), *bounds)
        except BudgetError as error:
            found.update(str(error).encode())
            continue
        losses = [
            LossCurves(rng.random() * np.linspace(1, 0, groups + 1) ** 2, rng.random() * np.linspace(1, 0, 97) ** 3)
            for _ in range(layers)
        ]
        for rates in (knapsack(budget, losses), Rates(*(tuple(rng.random() for _ in range(layers)) for _ in "af"))):
            found.update(repr((rates, widths_of(budget.project(rates)), budget.tolerance)).encode())
    assert found.hexdigest() == "5ecd7dafda2f2030ab902592159772782cbf008aa1520c7306a90019490f0a75"


def curves(seed=0):
    draws = np.random.default_rng(seed)
    return [
        LossCurves(draws.random() * np.linspace(1, 0, 5) ** 2, draws.random() * np.linspace(1, 0, 97) ** 2)
        for _ in SHAPE.dense.layers
    ]


def test_the_knapsack_takes_what_the_runtime_charges_most_for():
    """Attention that is dear in a runtime is cut, and the same attention is kept where the FFN is dear."""
    aim = target_of({"speedup": 1.4}, "onnx")
    kept = {}
    for name, group, channel in (("attention", 30.0, 0.1), ("ffn", 0.1, 2.0)):
        budget = Budget.for_target(SHAPE, Costs.linear(SHAPE, group, channel, 50.0, "ms"), aim)
        plan = budget.project(knapsack(budget, curves()))
        assert budget.costs.of(plan) == pytest.approx(aim.wanted(budget.costs), rel=0.02)
        kept[name] = sum(w.num_key_value_heads for w in plan.layers)
    assert kept["attention"] < kept["ffn"]


def test_a_staircase_is_cut_at_its_steps():
    """Widths that cost the same as a wider one gain nothing: the knapsack takes none of them."""
    stairs = np.ceil(np.arange(97) / 32) * 32.0
    costs = Costs(LINEAR.attention, (stairs,) * 6, 100.0, "ms")
    budget = Budget.for_target(SHAPE, costs, target_of({"speedup": 1.3}, "gguf"))
    rates = knapsack(budget, curves())
    assert {round(96 * (1 - rate)) % 32 for rate in rates.ffn} == {0}


def test_a_target_that_cannot_be_reached_is_refused_with_the_best_that_can():
    with pytest.raises(BudgetError) as refused:
        Budget.for_target(SHAPE, LINEAR, target_of({"speedup": 9}, "onnx"))
    most = LINEAR.dense / LINEAR.of(Plan.of([10] * 6, [1] * 6))  # p_max = 0.9 of 96 channels
    assert refused.value.message.startswith("speedup=9 in onnx cannot be reached")
    assert refused.value.message.endswith(f"reach between 1.000 and {most:.3f}.")
    assert "\n" not in str(refused.value)
    for wanted in ({"latency": 1e4}, {"latency": 1}, {"memory": "9GB"}, {"kv_cache": 0.01}):
        with pytest.raises(BudgetError, match="cannot be reached"):
            Budget.for_target(SHAPE, LINEAR, target_of(wanted, "onnx"))


def test_a_runtime_in_which_narrower_is_no_faster_is_refused():
    flat = Costs.linear(SHAPE, 0.0, 0.0, 100.0, "ms")
    with pytest.raises(BudgetError, match="not measured to save anything"):
        Budget.for_target(SHAPE, flat, SPEEDUP)


def test_tied_rates_are_refused():
    with pytest.raises(BudgetError, match="tied=true"):
        Budget.for_target(SHAPE, LINEAR, SPEEDUP, tied=True)


@pytest.mark.parametrize("wanted", [0.5, 6 * 4 * 64 * 0.75])
def test_a_kv_cache_is_cut_from_attention_alone(wanted):
    costs = Costs.linear(SHAPE, 64.0, 0.0, unit="bytes")
    budget = Budget.for_target(SHAPE, costs, target_of({"kv_cache": wanted}, "torch"))
    rng = np.random.default_rng(0)
    asked = [*seeds(budget, curves()).values(), *(p.rates for p in RandomProposer(budget).ask("initial", [], 5, rng))]
    scored = [Scored(p := budget.project(r), budget.rates(p), 1.0, 1.0, "seed", 0) for r in asked]
    asked += [p.rates for p in EvolutionProposer(budget).ask("mutation", scored, 5, rng)]
    for rates in asked:
        plan = budget.project(rates)
        assert costs.of(plan) == budget.target.wanted(costs)
        assert {w.intermediate_size for w in plan.layers} == {96}
    with pytest.raises(BudgetError, match="p_min"):
        Budget.for_target(SHAPE, costs, target_of({"kv_cache": wanted}, "torch"), p_min=0.1)


def test_costs_have_a_digest_of_their_own():
    assert LINEAR.digest() == Costs.linear(SHAPE, 5.0, 0.5, 100.0, "ms").digest()
    assert LINEAR.digest() != Costs.linear(SHAPE, 5.0, math.nextafter(0.5, 1), 100.0, "ms").digest()
