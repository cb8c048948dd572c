"""Whose Fisher information goes where: the attention's to o_proj and KV groups, the FFN's to down_proj and channels."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.pruning.importance import rank
from selfpruner_hub.pruning.least_squares import LinearFit, fit_inputs
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import first_repairs
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model

WINDOWS = torch.randint(3, 128, (70, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def known():
    """A model, its statistics, and a planted R: the loss minds two of the outputs alone."""
    model = tiny_model("llama")
    size = model.config.hidden_size
    root = torch.cat([torch.full((2,), 30.0), torch.full((size - 2,), 0.03)]).diag()
    return model, calibrate(model, WINDOWS), root


def planted(root, part):
    """R for one part of every layer, and none for the other."""
    return [(root, None) if part == "attention" else (None, root)] * 4


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_of_the_order(part, known):
    model, statistics, root = known
    plain, moved = rank(model, statistics), rank(model, statistics, fisher=planted(root, part))
    same = {
        "attention": [one.groups.tolist() == two.groups.tolist() for one, two in zip(plain, moved, strict=True)],
        "ffn": [one.channels.tolist() == two.channels.tolist() for one, two in zip(plain, moved, strict=True)],
    }
    assert not all(same.pop(part))
    assert all(*same.values())


@pytest.mark.parametrize("part", [0, 1], ids=["attention", "ffn"])
def test_of_the_predicted_errors(part, known):
    model, statistics, root = known
    order, planted_in = rank(model, statistics), planted(root, ("attention", "ffn")[part])
    plain, moved = (
        Slicer(model, first_repairs(model, order, statistics, fisher)).errors() for fisher in (None, planted_in)
    )
    for one, two in zip(plain, moved, strict=True):
        assert not torch.allclose(one[part][:-1], two[part][:-1], rtol=0.1)
        assert torch.equal(one[1 - part], two[1 - part])


@pytest.fixture
def cut(known):
    """A pruned copy with the first repair."""
    model, statistics, _ = known
    order = rank(model, statistics)
    slicer = Slicer(model, first_repairs(model, order, statistics))
    with ordered(model, order):
        return slice_model(slicer, Budget(slicer.shape, 0.3).project(Rates((0.5,) * 4, (0.3,) * 4)))


@pytest.fixture(scope="module")
def roots():
    """An R for each output of each layer."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 32, generator=generator), torch.randn(32, 32, generator=generator)) for _ in range(4)]


def test_of_the_ridges_of_the_second_repair(known, cut, roots, monkeypatch):
    used = {}

    def spy(module, ridges, root, store):
        used.setdefault(module, []).append(root)
        return LinearFit(module, ridges, root, store)

    monkeypatch.setattr("selfpruner_hub.pruning.sequential_repair.LinearFit", spy)
    compensate(known[0], cut, WINDOWS, fisher=roots)
    for layer, (attention, ffn) in zip(decoder_layers(cut), roots, strict=True):
        assert all(root is attention for root in used.pop(layer.self_attn.o_proj))
        assert all(root is ffn for root in used.pop(layer.mlp.down_proj))
    assert not used


def test_of_the_step_of_gate_and_up(known, cut, roots, monkeypatch):
    """Errors of the FFN's output are weighed by its own R."""
    layers = iter(zip(decoder_layers(cut), roots, strict=True))

    def spy(stream, sizes, down, store):
        layer, (_, ffn) = next(layers)
        torch.testing.assert_close(down, ffn @ layer.mlp.down_proj.weight)
        return fit_inputs(stream, sizes, down, store)

    monkeypatch.setattr("selfpruner_hub.pruning.sequential_repair.fit_inputs", spy)
    compensate(known[0], cut, WINDOWS, fisher=roots)
    assert not list(layers)
