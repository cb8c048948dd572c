"""Seeds: each projects onto the budget, and the knapsack finds what trying everything finds."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.moves import moved
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects
from selfpruner_hub.plans.seeds import knapsack, refined, seeds


def shape(layers, width=32, groups=4):
    return ModelShape(
        hidden_size=16, head_dim=4, queries_per_group=2, dense=Plan.of([width] * layers, [groups] * layers)
    )


def convex(rng, size):
    """Loss that falls ever more slowly to zero as more is kept, `[size + 1]`."""
    return np.append(np.cumsum(np.sort(rng.random(size)))[::-1], 0.0)


def curves(shape, seed):
    rng = np.random.default_rng(seed)
    return [
        LossCurves(rng.uniform(0.1, 10) * convex(rng, w.num_key_value_heads), convex(rng, w.intermediate_size))
        for w in shape.dense.layers
    ]


def kept(shape, rates):
    """Groups kept, then channels kept."""
    groups = [(1 - r) * w.num_key_value_heads for r, w in zip(rates.attention, shape.dense.layers, strict=True)]
    channels = [(1 - r) * w.intermediate_size for r, w in zip(rates.ffn, shape.dense.layers, strict=True)]
    return [round(x) for x in groups], [round(x) for x in channels]


def total_loss(losses, groups, channels):
    return sum(c.attention[g] + c.ffn[f] for c, g, f in zip(losses, groups, channels, strict=True))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_the_knapsack_equals_brute_force(seed, beta):
    tiny = shape(layers=2, width=5, groups=2)
    losses = curves(tiny, seed)
    groups, channels = kept(tiny, knapsack(Budget(tiny, beta), losses))
    weights = tiny.weights(Plan.of(channels, groups))
    assert weights <= (1 - beta) * tiny.weights(tiny.dense)

    every = itertools.product(itertools.product([1, 2], repeat=2), itertools.product(range(1, 6), repeat=2))
    affordable = [(g, f) for g, f in every if tiny.weights(Plan.of(f, g)) <= weights]
    best = min(total_loss(losses, g, f) for g, f in affordable)
    assert total_loss(losses, groups, channels) == pytest.approx(best)


@pytest.mark.parametrize("tied", [False, True])
def test_attention_that_stays_whole_is_in_no_seed(tied):
    whole = replace(shape(layers=4), whole_attention=True)
    budget = Budget(whole, 0.3, tied=tied)
    for rates in seeds(budget, curves(whole, seed=0)).values():
        plan = budget.project(rates)
        assert {layer.num_key_value_heads for layer in plan.layers} == {4}
        assert whole.beta(plan) == pytest.approx(0.3, abs=budget.tolerance)
    assert knapsack(Budget(whole, 0.3), curves(whole, seed=0)).attention == (0,) * 4


def test_the_knapsack_spends_its_budget():
    wide = shape(layers=6)
    budget = Budget(wide, 0.3)
    for seed in range(10):
        groups, channels = kept(wide, knapsack(budget, curves(wide, seed)))
        assert 0 <= wide.beta(Plan.of(channels, groups)) - 0.3 <= wide.group_weights / wide.weights(wide.dense)


def test_the_knapsack_spares_the_layer_that_hurts():
    two = shape(layers=2)
    budget = Budget(two, 0.15)
    keep = np.arange(33)
    losses = [LossCurves(1e6 * (4.0 - np.arange(5)), scale * (32 - keep) ** 2.0) for scale in (1, 4)]
    rates = knapsack(budget, losses)
    assert rates.attention == (0, 0)
    cheap, dear = rates.ffn
    assert cheap == pytest.approx(4 * dear, abs=1 / 16)  # equal slopes: 1 · (32 - k) = 4 · (32 - k')


def test_the_knapsack_stays_within_p_max():
    two = shape(layers=2)
    losses = [
        LossCurves(np.zeros(5), np.zeros(33)),
        LossCurves(1e3 * (4.0 - np.arange(5)), 1e3 * (32.0 - np.arange(33))),
    ]
    rates = knapsack(Budget(two, 0.4, p_max=0.75), losses)
    assert (rates.attention[0], rates.ffn[0]) == (0.75, 0.75)  # free, but bounded


def test_a_tied_knapsack_gives_one_rate_a_layer_that_meets_beta():
    four = shape(layers=4)
    rates = knapsack(Budget(four, 0.3, tied=True), curves(four, 0))
    assert rates.attention == rates.ffn
    assert np.mean(rates.ffn) == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("layers", [1, 2, 30])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("beta", [0.1, 0.3, 0.6])
def test_every_seed_projects_onto_the_budget(layers, tied, beta):
    model = shape(layers)
    budget = Budget(model, beta, tied=tied)
    found = seeds(budget, curves(model, 3))
    assert list(found) == ["uniform", "ramp", "sensitivity", "blend"]
    for rates in found.values():
        assert abs(model.beta(budget.project(rates)) - beta) <= budget.tolerance + 1e-12


def test_without_curves_there_are_two_seeds():
    assert list(seeds(Budget(shape(4), 0.3))) == ["uniform", "ramp"]


def test_uniform_is_flat_and_ramp_rises():
    model = shape(layers=5)
    budget = Budget(model, 0.3)
    found = seeds(budget)
    assert set(found["uniform"].ffn) == {0.3}
    assert found["ramp"].ffn == pytest.approx((0.15, 0.225, 0.3, 0.375, 0.45))
    assert set(found["uniform"].attention + found["ramp"].attention) == {0.0}
    assert seeds(Budget(model, 0.3, tied=True))["ramp"].attention == found["ramp"].ffn


def test_blend_lies_half_way():
    model = shape(layers=4)
    budget = Budget(model, 0.3)
    found = seeds(budget, curves(model, 1))
    flat = budget.rates(budget.project(found["uniform"]))
    assert found["blend"].attention == found["sensitivity"].attention
    assert found["blend"].ffn == pytest.approx(np.add(found["sensitivity"].ffn, flat.ffn) / 2)


def together(losses, attention=1.0, ffn=1.0):
    """A measured loss in which layers that lose attention, or channels, make one another worse by a factor."""

    def loss(plan):
        groups = sum(c.attention[w.num_key_value_heads] for c, w in zip(losses, plan.layers, strict=True))
        channels = sum(c.ffn[w.intermediate_size] for c, w in zip(losses, plan.layers, strict=True))
        return float(attention * groups + ffn * channels)

    return loss


def test_the_knapsack_reckons_with_what_was_measured():
    model = shape(layers=6)
    budget, losses = Budget(model, 0.4), curves(model, 2)
    plain, doubled = seeds(budget, losses), seeds(budget, losses, together(losses, attention=2.0, ffn=0.5))
    expected = knapsack(budget, [LossCurves(4 * c.attention, c.ffn) for c in losses])
    assert doubled["sensitivity"] == expected
    assert sum(kept(model, doubled["sensitivity"])[0]) > sum(kept(model, plain["sensitivity"])[0])
    assert doubled["uniform"] == plain["uniform"]


def test_each_part_is_measured_alone():
    model = shape(layers=6)
    budget, losses = Budget(model, 0.4), curves(model, 2)
    measured = []
    seeds(budget, losses, lambda plan: measured.append(plan) or together(losses)(plan))
    first, second = ([(w.num_key_value_heads, w.intermediate_size) for w in plan.layers] for plan in measured)
    groups, channels = kept(model, budget.rates(budget.project(knapsack(budget, losses))))
    assert first == [(g, 32) for g in groups]
    assert second == [(4, f) for f in channels]


@pytest.mark.parametrize("broken", [0.0, -0.1, float("inf"), float("nan")])
def test_a_measurement_that_says_nothing_changes_nothing(broken):
    model = shape(layers=6)
    budget, losses = Budget(model, 0.4), curves(model, 2)
    assert seeds(budget, losses, lambda _: broken) == seeds(budget, losses)


def test_what_is_not_cut_is_not_measured():
    model = shape(layers=6)
    losses = [LossCurves(1e9 * c.attention, c.ffn) for c in curves(model, 2)]
    measured = []
    seeds(Budget(model, 0.3), losses, lambda plan: measured.append(plan) or 1.0)
    assert [{w.num_key_value_heads for w in plan.layers} for plan in measured] == [{4}]  # the FFN alone


NEVER = (np.inf,) * 8
EFFECTS = StepEffects(NEVER, NEVER, (*(0.1,) * 4, *NEVER[4:]), (*NEVER[:4], -1.4, -1.3, -1.2, -1.1))
"""Each of the first four layers may lose a step of its FFN for one of the others."""


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_a_plan_is_refined_by_as_many_moves_as_lower_its_loss(share):
    model = shape(layers=8, width=200)
    budget, asked = Budget(model, 0.4), []
    start = budget.project(seeds(budget)["uniform"])
    many = round(4 * share)
    moves = {"ffn_removed": range(many), "ffn_restored": range(4, 4 + many)}
    best = budget.project(moved(budget.rates(start), moves, budget))

    def loss(plan):
        kept, wanted = ([w.intermediate_size for w in each.layers] for each in (plan, best))
        return float(np.abs(np.subtract(kept, wanted)).sum())

    assert refined(budget, start, loss, lambda plan: asked.append(plan) or EFFECTS) == budget.rates(best)
    assert asked == [start]
    assert (best == start) == (share == 0)


def test_the_refined_seed_starts_from_the_knapsack():
    model = shape(layers=8, width=200)
    budget, losses, asked = Budget(model, 0.4), curves(model, 2), []
    found = seeds(budget, losses, together(losses), lambda plan: asked.append(plan) or EFFECTS)
    assert list(found) == ["uniform", "ramp", "sensitivity", "blend", "refined"]
    assert asked == [budget.project(found["sensitivity"])]
    assert together(losses)(budget.project(found["refined"])) <= together(losses)(asked[0])
