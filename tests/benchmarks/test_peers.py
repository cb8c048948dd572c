"""The baselines of `benchmarks/front.py`, each on a case that can be checked by hand."""

from __future__ import annotations

import pytest
import torch
from peers import Flap, block_influence, taylor, without_blocks
from support.tiny import tiny_model

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.models.architectures import decoder_layers, shape_of
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.pruning.ordering import ordered

WINDOWS = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return tiny_model("llama")


def test_taylor_is_the_first_order_change_of_the_loss(model):
    """With one weight of a channel that is not 0 behind the activation, |w · ∂L/∂w| is what scaling it does."""
    model.double()
    layer = decoder_layers(model)[2].mlp
    with torch.no_grad():
        layer.down_proj.weight[:, 7] = 0
        layer.down_proj.weight[4, 7] = 0.5
        layer.up_proj.weight[7, 1:] = 0
        layer.gate_proj.weight[7] = 0

    @torch.no_grad()
    def loss():  # transformers' own rounds to float32
        logits = model(WINDOWS).logits[:, :-1]
        return len(WINDOWS) * torch.nn.functional.cross_entropy(logits.flatten(0, 1), WINDOWS[:, 1:].flatten()).item()

    layer.act_fn = torch.nn.Identity()
    layer.gate_proj.bias = torch.nn.Parameter(torch.ones(48).double())
    scores = taylor(model, WINDOWS)[2]
    change = []
    for factor in (9, -7):  # far enough for a norm that works in float32
        with torch.no_grad():
            layer.down_proj.weight[4, 7] = 0.5 * factor
        change.append(loss())
    # The weight of up and that of down scale the same product; the gate's weights are 0, and add nothing. Torch-Pruning
    # takes the mean over the three.
    assert scores[7].item() == pytest.approx(2 * abs(change[0] - change[1]) / 16 / 3, rel=0.02)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_a_channel_that_says_nothing_has_no_importance(model):
    with torch.no_grad():
        decoder_layers(model)[0].mlp.down_proj.weight[:, 3] = 0
    scores = taylor(model, WINDOWS)[0]
    assert scores[3] == 0
    assert (scores > 0).sum() == len(scores) - 1


def test_a_layer_that_changes_nothing_has_no_influence(model):
    layer = decoder_layers(model)[2]
    with torch.no_grad():
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    influence = block_influence(model, WINDOWS)
    assert influence[2] == pytest.approx(0, abs=1e-6)
    assert min(influence[:2] + influence[3:]) > 1e-4
    with torch.no_grad():
        before = model(WINDOWS, use_cache=False).logits
        with with_layers(model, without_blocks(model, influence, 0.25)) as short:
            assert len(decoder_layers(short)) == 3
            torch.testing.assert_close(short(WINDOWS, use_cache=False).logits, before)


def test_flap_puts_back_what_never_varies(model):
    """A text of one token: every activation is constant, has no variance, and its loss is made good by the bias."""
    same = torch.full((4, 8), 17)
    statistics = calibrate(model, same)
    assert max(float(known.ffn.variance.max()) for known in statistics) < 1e-5
    known = Flap(model, statistics)
    plan = known.plan(0.5)
    assert shape_of(model.config).beta(plan) == pytest.approx(0.5, abs=0.02)
    with torch.no_grad():
        before = model(same, use_cache=False).logits
        with ordered(model, known.order), with_layers(model, known.layers(model, plan)) as cut:
            torch.testing.assert_close(cut(same, use_cache=False).logits, before, atol=1e-4, rtol=1e-3)


def test_flap_takes_the_least_of_all_layers_until_the_budget_is_met(model):
    known = Flap(model, calibrate(model, WINDOWS))
    groups = torch.full((4,), 9.0)
    known._scores = [(groups, torch.arange(48.0) + (100 if layer else 0)) for layer in range(4)]
    shape = shape_of(model.config)
    plan = known.plan(9 * shape.unit_weights / shape.weights(shape.dense))
    assert [w.intermediate_size for w in plan.layers] == [48 - 9, 48, 48, 48]  # scores 0 to 8 of the first layer
    plan = known.plan((9 * shape.unit_weights + 2 * shape.group_weights) / shape.weights(shape.dense))
    assert [w.num_key_value_heads for w in plan.layers] == [2, 4, 4, 4]  # then its groups, and one of them stays
