"""Decoding on a CPU: what transformers' own gives, by one product a KV group."""

from __future__ import annotations

import pytest
import torch
from support.tiny import DISTINCT, tiny_model

from selfpruner_hub.models.patching import add_gram, add_product, attending_by_group

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))


def written(model):
    """Logits of each step that follows a prompt, `[B, steps, V]`."""
    out = model.generate(
        IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("name", DISTINCT)
def test_it_writes_the_same(name):
    model = tiny_model(name)
    wanted = written(model)
    with attending_by_group(model):
        found = written(model)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_the_heads_of_a_group_are_rows_of_one_product(monkeypatch):
    asked, attend = [], torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        asked.append((query.shape[1:3], key.shape[1], kwargs.get("enable_gqa", False)))
        return attend(query, key, value, **kwargs)

    model = tiny_model("llama")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    with attending_by_group(model):
        written(model)
    prompt, steps = asked[:4], asked[4:]
    assert {groups for _, groups, _ in prompt} == {4}  # as transformers does it
    assert len(steps) == 3 * 4
    assert set(steps) == {((4, 2), 4, False)}  # 8 heads over 4 groups: 2 rows each


def test_how_a_model_attends_is_left_as_it_was():
    model = tiny_model("llama")

    def interrupted():
        with attending_by_group(model):
            assert model.config._attn_implementation != "sdpa"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_does_not_attend_by_sdpa_is_left_alone():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    with attending_by_group(model):
        assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(("left", "right"), [("bfloat16", "bfloat16"), ("float32", "float32"), ("float32", "bfloat16")])
def test_a_sum_of_products_is_not_rounded(left, right):
    """Where a CPU multiplies in bfloat16, a float32 factor would be off by up to 2⁻⁹ of itself."""
    settings, generator = torch.backends.mkldnn.matmul, torch.Generator().manual_seed(0)
    before = settings.fp32_precision
    a, b = (torch.randn(512, 96, generator=generator).to(getattr(torch, dtype)) for dtype in (left, right))
    total = torch.ones(96, 96)
    add_product(total, a, b)
    torch.testing.assert_close(total.double(), 1 + a.double().t() @ b.double(), atol=1e-4, rtol=1e-5)
    assert settings.fp32_precision == before


@pytest.mark.parametrize("width", [3, 4, 37, 128])
def test_a_symmetric_sum_is_that_of_the_full_product(width):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(64, width, generator=generator) for _ in range(2))
    total = torch.zeros(width, width)
    for x in (first, second):
        add_gram(total, x)
    torch.testing.assert_close(total, first.t() @ first + second.t() @ second)
