"""Layers that rest in host memory: on the device while they work, and back whatever happens."""

from __future__ import annotations

import gc

import pytest
import torch
from support.tiny import tiny_model
from support.virtual_device import BYTES, virtual_accelerator
from torch import nn

from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.placement import placed, stream_layers, streams

IDS = torch.randint(3, 128, (2, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def accelerator():
    gc.collect()
    with virtual_accelerator():
        yield torch.device("gpu", 0)


def places(module):
    return {tensor.device.type for tensor in (*module.parameters(), *module.buffers())}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_weights_are_back_after_the_work(error, accelerator):
    layer = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))  # the norm has buffers
    before = dict(layer.named_parameters())
    try:
        with placed(layer, accelerator):
            assert places(layer) == {"gpu"}
            layer[0].weight.data.zero_()  # of the copy
            with placed(layer, accelerator):
                assert not layer[0].weight.any()  # no second copy
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert places(layer) == {"cpu"}
    assert all(parameter is before[name] for name, parameter in layer.named_parameters())
    assert layer[0].weight.any()


def test_changes_are_copied_back(accelerator):
    layer = nn.Linear(3, 3)
    weight = layer.weight
    with placed(layer, accelerator, changed=True), torch.no_grad():
        layer.weight.copy_(torch.full((3, 3), 2.0))
    assert layer.weight is weight
    assert weight.tolist() == 3 * [[2.0, 2.0, 2.0]]


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "gemma3"])
@torch.no_grad()  # a graph would hold the weights of all layers
def test_one_layer_at_a_time_is_on_the_device(name, accelerator):
    model = tiny_model(name)
    expected = model(IDS).logits
    stream_layers(model, accelerator)
    stream_layers(model, accelerator)  # changes nothing
    tied = model.config.tie_word_embeddings
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert streams(model)
    assert model.device == accelerator
    layer = decoder_layers(model)[0]
    size = sum(parameter.nbytes for parameter in layer.parameters())
    seen = []
    hooks = [each.mlp.register_forward_pre_hook(lambda *_: seen.append(BYTES.now)) for each in decoder_layers(model)]
    before = BYTES.now
    torch.testing.assert_close(model(IDS.to("gpu")).logits.cpu(), expected)
    assert len(seen) == len(decoder_layers(model)) == len(hooks)
    assert all(size <= now - before < 2 * size for now in seen)  # its weights, and a few activations
    assert places(decoder_layers(model)) == {"cpu"}
    model.to(accelerator)  # what a user may do with the result
    torch.testing.assert_close(model(IDS.to("gpu")).logits.cpu(), expected)


def test_gradients_reach_the_inputs_of_streamed_layers(accelerator):
    model = tiny_model("llama")
    embedded = model.get_input_embeddings()(IDS).detach().requires_grad_()
    (expected,) = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().sum(), embedded)
    stream_layers(model, accelerator)
    moved = embedded.detach().to("gpu").requires_grad_()
    (found,) = torch.autograd.grad(model(inputs_embeds=moved).logits.square().sum(), moved)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-3)
