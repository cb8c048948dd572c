"""Layers are cut where they should be, their repairs are cached within a limit, a pruned model is one of its own."""

from __future__ import annotations

import pytest
import torch
from support.checks import logits
from support.tiny import tiny_model, uneven
from transformers import AutoModelForCausalLM

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.weights import is_tied
from selfpruner_hub.plans.plan import LayerWidths, Plan
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import first_repairs
from selfpruner_hub.pruning.slicing import Slicer, slice_model

WINDOWS = torch.randint(3, 128, (16, 16), generator=torch.Generator().manual_seed(0))
IDS = WINDOWS[:2]


@pytest.fixture(scope="module")
def slicer():
    """Of a tiny model, in its order while the tests last."""
    model = tiny_model("llama")
    statistics = calibrate(model, WINDOWS)
    order = rank(model, statistics)
    repairs = first_repairs(model, order, statistics)
    with ordered(model, order):
        yield Slicer(model, repairs)


def test_every_layer_has_its_own_repairs_and_they_are_found_again(slicer):
    kept = LayerWidths(24, 2)
    for _ in range(2):  # made, then cached
        for index in range(4):
            layer = slicer.layer(index, kept)
            assert torch.equal(layer.mlp.down_proj.weight, slicer.output_weight(index, "ffn", 24))
            assert torch.equal(layer.self_attn.o_proj.weight, slicer.output_weight(index, "attention", 2))


def test_the_cache_of_repairs_takes_as_much_as_the_output_projections(slicer):
    limit = sum(layer.mlp.down_proj.weight.numel() + layer.self_attn.o_proj.weight.numel() for layer in slicer._dense)
    for width in range(1, 48):
        slicer.layers(Plan(tuple(LayerWidths(width, 1 + width % 3) for _ in range(4))))
    cached = [weight.numel() for weight in slicer._cache.values()]
    assert limit / 2 < sum(cached) <= limit


def test_predicted_losses_are_half_of_the_errors_by_kv_group_and_by_channel(slicer):
    for curves, (attention, ffn) in zip(slicer.loss_curves(), slicer.errors(), strict=True):
        assert (len(curves.attention), len(curves.ffn)) == (4 + 1, 48 + 1)
        assert curves.attention == pytest.approx(attention.double().numpy() / 2)
        assert curves.ffn == pytest.approx(ffn.double().numpy() / 2)


def test_the_statistics_are_in_the_order_of_the_weights():
    model = tiny_model("llama")
    statistics = calibrate(model, WINDOWS)
    turned = LayerOrder(torch.arange(4).flip(0), torch.arange(48).flip(0))
    slicer = Slicer(model, first_repairs(model, [turned] * 4, statistics))
    size = slicer.unit("query")
    groups = torch.arange(4 * size).view(4, size).flip(0).flatten()
    for repairs, known in zip(slicer.repairs, statistics, strict=True):
        for repair, moments, order in zip(
            repairs, (known.attention, known.ffn), (groups, turned.channels), strict=True
        ):
            damped = moments.gram[order][:, order]
            damped.diagonal().add_(moments.ridge * damped.diagonal().mean())
            torch.testing.assert_close(repair._factor @ repair._factor.t(), damped, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_layers_that_lose_nothing_but_kv_groups_and_channels_of_zeros_compute_the_same(name):
    """phi3 has its projections fused: three blocks in one, of which each is cut."""
    model = tiny_model(name)
    shape = shape_of(model.config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 40:] = 0
            layer.self_attn.o_proj.weight[:, 3 * shape.queries_per_group * shape.head_dim :] = 0
    pruned = slice_model(Slicer(model), Plan((LayerWidths(40, 3),) * 4))
    torch.testing.assert_close(logits(pruned, IDS), logits(model, IDS), atol=1e-5, rtol=1e-5)


def test_a_pruned_model_has_its_own_memory_and_the_settings_of_generation():
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    pruned = slice_model(Slicer(model), Plan((LayerWidths(40, 3),) * 4))
    assert pruned.generation_config.max_new_tokens == 7
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert theirs.isdisjoint(parameter.untyped_storage().data_ptr() for parameter in pruned.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_decide_whether_a_pruned_model_is_tied(tied, tmp_path):
    """The configuration says the opposite: a head was replaced, or shared, after the model was built."""
    model = tiny_model("llama-mha-tied" if not tied else "llama")
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    outputs.weight = inputs.weight if tied else torch.nn.Parameter(inputs.weight.flip(0))
    pruned = uneven(model)
    pruned.save_pretrained(tmp_path)
    for made in (pruned, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert is_tied(made) == made.config.tie_word_embeddings == tied
        assert torch.equal(made.get_output_embeddings().weight, outputs.weight)
