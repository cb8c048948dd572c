"""The second repair brings the pruned stream back to the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny import DISTINCT, tiny_model

from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.pruning import sequential_repair
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.pruning.sequential_repair import REPAIR_RIDGES, compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model
from selfpruner_hub.search.proposers import random_rates
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import Run

WINDOWS = torch.randint(3, 128, (70, 16), generator=torch.Generator().manual_seed(0))


def cut(model, plan=None):
    """A pruned copy with the first repair, of a random plan on β = 0.3 unless one is given."""
    with prepared(model, WINDOWS, PruneSettings()) as ready:
        slicer = ready.slicer
        if plan is None:
            budget = Budget(slicer.shape, 0.3)
            plan = budget.project(random_rates(budget, np.random.default_rng(0)))
        return slice_model(slicer, plan)


@torch.no_grad()
def error(dense, pruned, windows=WINDOWS):
    """Mean squared distance of the last hidden states."""
    a, b = (m.get_decoder()(windows, use_cache=False).last_hidden_state for m in (dense, pruned))
    return (a - b).square().mean().item()


@pytest.mark.parametrize("architecture", DISTINCT)
def test_the_streams_come_closer(architecture):
    model = tiny_model(architecture)
    pruned = cut(model)
    before, widths = error(model, pruned), [p.shape for p in pruned.parameters()]
    told = []
    compensate(model, pruned, WINDOWS, ridges=(1e-4,), run=Run(progress=lambda *what: told.append(what)))
    assert error(model, pruned) < before
    assert [p.shape for p in pruned.parameters()] == widths
    assert all(p.requires_grad for p in pruned.parameters())
    assert told[-1] == ("repairing", len(decoder_layers(model)), len(decoder_layers(model)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in (model, pruned) for m in x.modules())


@pytest.mark.parametrize("architecture", ["llama", "cohere2", "granite", "starcoder2"])
def test_no_change_of_an_output_projection_brings_the_stream_closer(architecture):
    """The last down_proj is optimal for the stream behind it: its gradient vanishes where λ is nothing.

    With outputs that are scaled before they are added (Granite), and with attention and FFN side by side (Cohere).
    """
    model = tiny_model(architecture)
    pruned = cut(model)
    compensate(model, pruned, WINDOWS, ridges=(1e-9,))
    states = []
    for m in (model, pruned):
        handle = decoder_layers(m)[-1].register_forward_hook(lambda _m, _a, out: states.append(out))
        m.get_decoder()(WINDOWS, use_cache=False)
        handle.remove()
    loss = (states[0].detach() - states[1]).square().mean()
    weight = linear(decoder_layers(pruned)[-1], architecture_of(model.config).ffn_output).weight
    gradient = torch.autograd.grad(loss, weight)[0]
    scale = states[0].detach().square().mean() / weight.detach().square().mean().sqrt()
    assert gradient.abs().max() < 1e-4 * scale
    with torch.no_grad():
        for seed in range(5):
            noise = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
            weight += noise
            moved = []
            handle = decoder_layers(pruned)[-1].register_forward_hook(lambda _m, _a, out, to=moved: to.append(out))
            pruned.get_decoder()(WINDOWS, use_cache=False)
            handle.remove()
            weight -= noise
            assert (states[0] - moved[0]).square().mean() > loss


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_ridge_is_chosen_on_windows_that_are_held_out(architecture):
    """Of a little text, what other text does not bear out is not fitted; of much, nearly all is."""
    unseen = torch.randint(3, 128, (40, 16), generator=torch.Generator().manual_seed(1))
    model = tiny_model(architecture)
    errors = {}
    for windows in (WINDOWS[:8], WINDOWS):
        for ridges in (REPAIR_RIDGES, REPAIR_RIDGES[:1], REPAIR_RIDGES[-1:]):
            pruned = cut(model)
            compensate(model, pruned, windows, ridges)
            errors[len(windows), ridges] = error(model, pruned, unseen)
    assert errors[8, REPAIR_RIDGES] < 0.9 * errors[8, REPAIR_RIDGES[:1]]
    assert errors[70, REPAIR_RIDGES] < 1.02 * min(errors[70, REPAIR_RIDGES[:1]], errors[70, REPAIR_RIDGES[-1:]])
    assert errors[70, REPAIR_RIDGES] < errors[8, REPAIR_RIDGES]


def test_gate_and_up_move_toward_what_the_loss_minds():
    """Where it minds two of the outputs alone, those come nearer than where all are alike, and the others less so.

    Behind the first layer, where nothing else differs.
    """
    model = tiny_model("llama")
    size = model.config.hidden_size
    minded = torch.cat([torch.full((2,), 10.0), torch.full((size - 2,), 0.1)])
    distances = []
    for fisher in (None, [(minded.diag(), minded.diag())] * len(decoder_layers(model))):
        pruned = cut(model)
        compensate(model, pruned, WINDOWS, fisher=fisher)
        states = []
        for m in (model, pruned):
            handle = decoder_layers(m)[0].register_forward_hook(lambda _m, _a, out, to=states: to.append(out))
            with torch.no_grad():
                m.get_decoder()(WINDOWS, use_cache=False)
            handle.remove()
        distances.append((states[0] - states[1]).square().mean((0, 1)))
    assert distances[1][:2].sum() < 0.6 * distances[0][:2].sum()
    assert distances[1][2:].sum() > 1.2 * distances[0][2:].sum()


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
@torch.no_grad()
def test_where_outputs_are_normalised_they_are_fitted_to_the_dense_ones(name):
    """Without the drift of the layers before, which is in other units: the error left is orthogonal to the inputs."""
    model = tiny_model(name)
    pruned, architecture = cut(model), architecture_of(model.config)
    compensate(model, pruned, WINDOWS, ridges=(1e-9,), inputs=False)
    passed = {}

    def record(module, inputs, output):
        passed[module] = inputs[0].flatten(0, 1), output.flatten(0, 1)

    pairs = [
        [linear(layer, path) for layer in layers]
        for layers in zip(decoder_layers(model), decoder_layers(pruned), strict=True)
        for path in (architecture.attention_output, architecture.ffn_output)
    ]
    for module in (module for pair in pairs for module in pair):
        module.register_forward_hook(record)
    for each in (model, pruned):
        each(WINDOWS)
    for dense, fitted in pairs:
        (_, target), (inputs, output) = passed[dense], passed[fitted]
        assert ((target - output).T @ inputs).norm() < 1e-5 * target.norm() * inputs.norm()


@torch.no_grad()
def test_down_proj_is_fitted_to_the_gate_and_up_that_moved():
    """What is left of the stream's error behind each layer is orthogonal to the inputs of its down_proj."""
    model = tiny_model("llama")
    pruned = cut(model)
    gates = [layer.mlp.gate_proj.weight.clone() for layer in decoder_layers(pruned)]
    compensate(model, pruned, WINDOWS, ridges=(1e-9,))
    assert any(
        not torch.equal(layer.mlp.gate_proj.weight, gate)
        for layer, gate in zip(decoder_layers(pruned), gates, strict=True)
    )
    states, inputs = {False: [], True: []}, []
    for each in (model, pruned):
        for layer in decoder_layers(each):
            layer.register_forward_hook(lambda _m, _a, out, to=states[each is pruned]: to.append(out.flatten(0, 1)))
    for layer in decoder_layers(pruned):
        layer.mlp.down_proj.register_forward_hook(lambda _m, args, _out: inputs.append(args[0].flatten(0, 1)))
    for each in (model, pruned):
        each(WINDOWS)
    for target, output, read in zip(states[False], states[True], inputs, strict=True):
        assert ((target - output).T @ read).norm() < 1e-5 * target.norm() * read.norm()


def test_gate_and_up_stay_where_their_step_helps_no_window_that_is_held_out(monkeypatch):
    model = tiny_model("llama")
    pruned = cut(model)
    before = [
        (layer.mlp.gate_proj.weight.clone(), layer.mlp.up_proj.weight.clone()) for layer in decoder_layers(pruned)
    ]
    monkeypatch.setattr(sequential_repair, "fit_inputs", lambda _stream, sizes, *_: torch.full(sizes, 10.0))
    compensate(model, pruned, WINDOWS)
    for layer, (gate, up) in zip(decoder_layers(pruned), before, strict=True):
        assert torch.equal(layer.mlp.gate_proj.weight, gate)
        assert torch.equal(layer.mlp.up_proj.weight, up)


def test_too_few_windows_to_hold_one_out():
    model = tiny_model("llama")
    two, greatest = cut(model), cut(model)
    compensate(model, two, WINDOWS[:2])
    compensate(model, greatest, WINDOWS[:2], REPAIR_RIDGES[-1:])
    for a, b in zip(two.parameters(), greatest.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_model_that_lost_nothing_stays_as_it_is():
    model = tiny_model("llama")
    whole = cut(model, Slicer(model).shape.dense)
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    compensate(model, whole, WINDOWS)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-3)


def test_batches_do_not_matter(monkeypatch):
    model = tiny_model("gemma3")
    weights = []
    for tokens in (64, 1 << 20):
        monkeypatch.setattr("selfpruner_hub.models.layer_stream.LAYER_BATCH_TOKENS", tokens)
        pruned = cut(model)
        compensate(model, pruned, WINDOWS)
        weights.append(torch.cat([p.flatten() for p in pruned.parameters()]))
    torch.testing.assert_close(*weights, atol=1e-4, rtol=1e-3)
