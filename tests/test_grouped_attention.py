"""The attention that ONNX graphs for CPUs are traced with: what transformers' own gives, without its copies."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

from exporters.grouped_attention import attending_by_groups, grouped_attention

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


class Owner(torch.nn.Module):
    """What transformers' attention wants to know of the module that it is for."""

    head_dim, num_key_value_groups, training = 16, 3, False


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("scaling", [None, 0.5])
@pytest.mark.parametrize("length", [1, 5])
def test_equal_to_transformers(length, scaling, softcap):
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, length, 16), torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.zeros(2, 1, length, 9)
    mask[1, :, :, :4] = torch.finfo(torch.float32).min
    wanted, _ = eager_attention_forward(Owner(), query, key, value, mask, scaling=scaling, softcap=softcap)
    found, _ = grouped_attention(Owner(), query, key, value, mask, scaling=scaling, softcap=softcap)
    torch.testing.assert_close(found, wanted)


def test_a_model_attends_so_for_a_while():
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    before = model(IDS, attention_mask=mask).logits
    with attending_by_groups(model):
        torch.testing.assert_close(model(IDS, attention_mask=mask).logits[mask.bool()], before[mask.bool()])
        named = model.config._attn_implementation
    assert named != model.config._attn_implementation
    assert torch.equal(model(IDS, attention_mask=mask).logits, before)
