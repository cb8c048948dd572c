"""SliceGPT of `benchmarks/slicegpt.py`: nothing is lost where nothing is cut, or where the stream is flat."""

from __future__ import annotations

import pytest
import torch
from slicegpt import components, sliced
from support.tiny import tiny_model

from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.patching import with_layers

WINDOWS = torch.randint(3, 128, (6, 16), generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(WINDOWS, use_cache=False).logits


@pytest.fixture
def model():
    return tiny_model("llama")


def test_all_components_are_the_dense_model(model):
    before = logits(model)
    with with_layers(model, sliced(model, WINDOWS, model.config.hidden_size)) as same:
        torch.testing.assert_close(logits(same), before, atol=1e-4, rtol=1e-4)


def test_a_stream_in_few_dimensions_is_kept_whole(model):
    """All that embeddings, attention and FFN write lies in 20 of 32 dimensions, and these are not the first ones."""
    basis = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(1))).Q
    flat = basis @ basis.t()
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        embeddings.copy_(embeddings @ flat)
        for layer in decoder_layers(model):
            for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
                module.weight.copy_(flat @ module.weight)
                if module.bias is not None:
                    module.bias.copy_(flat @ module.bias)
    before = logits(model)
    with with_layers(model, sliced(model, WINDOWS, 20)) as cut:
        torch.testing.assert_close(logits(cut), before, atol=1e-4, rtol=1e-4)
    with with_layers(model, sliced(model, WINDOWS, 19)) as cut:
        assert (logits(cut) - before).abs().max() > 1e-3


def test_the_budget_counts_the_shortcuts(model):
    def weights(layer):
        return sum(p.numel() for p in layer.parameters() if p.dim() > 1)

    layers, dense = sliced(model, WINDOWS, components(model, 0.3)), decoder_layers(model)
    assert 0.65 * weights(dense[1]) < weights(layers[1]) <= 0.7 * weights(dense[1])
