"""The scale of the logits: found where it is known, the best of all, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.checks import logits
from support.tiny import DISTINCT, surer, tiny_model

from selfpruner_hub.pruning.temperature import SCALES, match_confidence

WINDOWS = torch.randint(5, 60, (6, 32), generator=torch.Generator().manual_seed(0))


def diverged(model, other):
    p, q = (logits(each, WINDOWS)[:, :-1].log_softmax(-1) for each in (model, other))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("architecture", DISTINCT)
def test_too_much_confidence_is_taken_back(architecture):
    model = surer(tiny_model(architecture), 20)  # so that there is any
    other = surer(model, 1 / 0.8)
    assert not torch.allclose(logits(other, WINDOWS), logits(model, WINDOWS), atol=1e-2)
    assert match_confidence(model, other, WINDOWS) == 0.8
    torch.testing.assert_close(logits(other, WINDOWS), logits(model, WINDOWS), atol=1e-4, rtol=1e-4)


def test_it_is_the_best_of_all_scales():
    model = surer(tiny_model("llama"), 6)
    other = copy.deepcopy(model)
    down = other.get_decoder().layers[1].mlp.down_proj.weight
    down.data += 0.03 * torch.randn(down.shape, generator=torch.Generator().manual_seed(1))
    reached = {scale: diverged(model, surer(other, scale)) for scale in SCALES}
    before = logits(other, WINDOWS)
    told = []
    scale = match_confidence(model, other, WINDOWS, lambda *what: told.append(what))
    assert told[-1] == ("matching confidence", 6 * 31, 6 * 31)
    assert told == sorted(told)
    assert scale == min(reached, key=reached.get)
    assert 0.5 < scale < 1
    torch.testing.assert_close(logits(other, WINDOWS), scale * before, atol=1e-3, rtol=1e-3)


def test_a_model_as_sure_as_its_parent_stays_as_it_is():
    model = surer(tiny_model("gemma2"), 20)
    other = copy.deepcopy(model)
    assert match_confidence(model, other, WINDOWS) == 1
    assert torch.equal(logits(other, WINDOWS), logits(model, WINDOWS))
