"""Scores against their formulas, OBS against brute force, and the orders they give."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model

from selfpruner_hub.calibration.statistics import Moments, calibrate
from selfpruner_hub.errors import UserError
from selfpruner_hub.pruning import importance
from selfpruner_hub.pruning.importance import ORDERS, energy, flap, obs, rank, wanda_sp

WINDOWS = torch.randint(3, 128, (16, 16), generator=torch.Generator().manual_seed(0))


def test_scores_on_a_case_worked_by_hand():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # column means 2 and 2; variances 1 and 0; energies 5 and 4
    moments = Moments(x.mean(0), x.t() @ x / 2)
    for score, values in ((wanda_sp, [4 * 5**0.5, 4.0]), (flap, [10.0, 0.0]), (energy, [50.0, 16.0])):
        torch.testing.assert_close(score(weight, moments), torch.tensor(values))


def test_a_group_counts_by_the_sum_of_its_columns():
    moments = Moments(torch.zeros(4), torch.eye(4))
    weight = torch.tensor([[3.0, 0.0, 2.0, 2.0]])
    assert ORDERS["wanda-sp"](weight, moments, 2, None).tolist() == [1, 0]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("unit", [1, 3])
def test_obs_equals_brute_force(unit, alike, monkeypatch):
    """Each step removes the unit without which least squares on the inputs themselves does best for the loss."""
    monkeypatch.setattr(importance, "COMPACTED", 2)
    generator = torch.Generator().manual_seed(unit)
    columns, out, tokens = 6 * unit, 5, 300
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(out, columns, generator=generator)
    units = torch.arange(columns).view(-1, unit)
    root = torch.eye(out) if alike else torch.randn(out, out, generator=generator).triu()

    def error(kept):
        inputs = x[:, units[kept].flatten()].double()
        target = (x @ weight.t()).double()
        rest = target - inputs @ torch.linalg.lstsq(inputs, target).solution
        return (rest @ root.t().double()).square().sum()

    kept, removed = list(range(6)), []
    while len(kept) > 1:
        least = min(kept, key=lambda unit: error([k for k in kept if k != unit]))
        kept.remove(least)
        removed.append(least)
    order = obs(weight, Moments(x.mean(0), x.t() @ x / tokens, ridge=1e-7), unit, None if alike else root)
    assert order.tolist() == [*kept, *reversed(removed)]


def test_obs_goes_on_where_rounding_leaves_a_block_indefinite(monkeypatch):
    x = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    moments = Moments(x.mean(0), x.t() @ x / 300)
    expected, exact = obs(weight, moments, 3), torch.linalg.cholesky_ex
    calls = []

    def spoiled(matrix):
        factor, failed = exact(matrix)
        calls.append(matrix.shape)
        return factor, torch.ones_like(failed) if len(calls) == 2 else failed

    monkeypatch.setattr(torch.linalg, "cholesky_ex", spoiled)
    assert obs(weight, moments, 3).tolist() == expected.tolist()
    assert calls[1] == calls[2]  # tried once more


@pytest.mark.parametrize("name", ORDERS)
def test_rank_puts_dead_units_last(name):
    model = tiny_model("llama")
    heads = 2 * 4  # two query heads of four dimensions a group
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data[:, 5 + index] = 0
        layer.self_attn.o_proj.weight.data[:, heads * (index % 4) : heads * (index % 4 + 1)] = 0
    for index, order in enumerate(rank(model, calibrate(model, WINDOWS), name)):
        assert order.channels[-1] == 5 + index
        assert order.groups[-1] == index % 4
        assert sorted(order.channels.tolist()) == list(range(48))
        assert order.channels[order.inverse().channels].tolist() == list(range(48))


def test_unknown_importance_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="wanda-sp"):
        rank(model, calibrate(model, WINDOWS), "magnitude")


def test_obs_removes_several_at_once_where_there_are_many(monkeypatch):
    """A step takes the units that are least before it."""
    weight = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    moments = Moments(torch.zeros(12), torch.eye(12))  # nothing to repair with: the scores stay as they are
    monkeypatch.setattr(importance, "STEPS", 4)
    order = obs(weight, moments, 1).view(4, 3)
    expected = weight.square().sum(0).argsort(descending=True).view(4, 3)
    assert order.sort().values.tolist() == expected.sort().values.tolist()
