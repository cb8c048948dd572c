"""Scores against their formulas, and the order they give."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from selfpruner_hub.calibration import Moments, calibrate
from selfpruner_hub.errors import UserError
from selfpruner_hub.importance import SCORES, rank

WINDOWS = torch.randint(3, 128, (16, 16), generator=torch.Generator().manual_seed(0))


def test_scores_on_a_case_worked_by_hand():
    weight = torch.tensor([[1.0, -2.0], [3.0, 0.0]])
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])  # column means 2 and 2; variances 1 and 0; energies 5 and 4
    moments = Moments(x.mean(0), x.t() @ x / 2)
    expected = {"wanda-sp": [4 * 5**0.5, 4.0], "flap": [10.0, 0.0], "energy": [50.0, 16.0]}
    assert set(expected) == set(SCORES)
    for name, values in expected.items():
        torch.testing.assert_close(SCORES[name](weight, moments), torch.tensor(values))


@pytest.mark.parametrize("score", SCORES)
def test_rank_puts_dead_units_last(score):
    model = tiny_model("llama")
    heads = 2 * 4  # two query heads of four dimensions a group
    for index, layer in enumerate(model.model.layers):
        layer.mlp.down_proj.weight.data[:, 5 + index] = 0
        layer.self_attn.o_proj.weight.data[:, heads * (index % 4) : heads * (index % 4 + 1)] = 0
    for index, order in enumerate(rank(model, calibrate(model, WINDOWS), score)):
        assert order.channels[-1] == 5 + index
        assert order.groups[-1] == index % 4
        assert sorted(order.channels.tolist()) == list(range(48))
        assert order.channels[order.inverse().channels].tolist() == list(range(48))


def test_unknown_score_is_refused():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="wanda-sp"):
        rank(model, calibrate(model, WINDOWS), "magnitude")
