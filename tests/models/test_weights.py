"""Copies of a model in another dtype: its values, shared weights, and nothing of the first one."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_pruned
from support.virtual_device import BYTES, virtual_accelerator
from transformers import AutoModelForCausalLM

from selfpruner_hub.models.architectures import logit_scale
from selfpruner_hub.models.weights import converted, is_tied


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied", "gemma3"])
def test_a_copy_in_another_dtype(name):
    model = tiny_model(name)
    copied = converted(model.to(torch.bfloat16), torch.float32)
    assert {weight.dtype for weight in copied.parameters()} == {torch.float32}
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert is_tied(copied) == is_tied(model)
    for (key, weight), copy in zip(model.named_parameters(), copied.parameters(), strict=True):
        assert torch.equal(weight.float(), copy), key


def test_a_copy_in_the_same_dtype_shares_nothing():
    model = tiny_model("llama")
    copied = converted(model, torch.float32, "cpu")
    ours = {weight.data_ptr() for weight in (*model.parameters(), *model.buffers())}
    assert ours.isdisjoint(weight.data_ptr() for weight in (*copied.parameters(), *copied.buffers()))


def test_no_second_model_is_on_the_device():
    """An export reads a model on an accelerator without room for another one there."""
    with virtual_accelerator():
        model = tiny_model("llama").to("gpu")
        BYTES.peak = before = BYTES.now
        copied = converted(model, torch.float32, "cpu")
        assert BYTES.peak == before
        assert {weight.device.type for weight in copied.parameters()} == {"cpu"}


def test_the_scale_of_the_logits_has_the_name_that_vllm_reads(tmp_path):
    """Granite divides its logits; vLLM's Transformers backend multiplies them, by a factor of another name."""
    pruned = tiny_pruned("granite")
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).config
    assert again.logits_scaling == 2.0
    assert again.logit_scale == 0.5
    assert logit_scale(again) == logit_scale(pruned.config) == 0.5
