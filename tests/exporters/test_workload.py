"""The ideal: what is counted from a configuration is what the model has and does."""

from __future__ import annotations

import pytest
import torch
from support.tiny import CONFIGS, tiny_model, tiny_pruned
from torch.utils.flop_counter import FlopCounterMode

from exporters.benchmark.workload import workload_of

each = pytest.mark.parametrize("name", CONFIGS)
makes = pytest.mark.parametrize("make", [tiny_model, tiny_pruned])


@each
@makes
def test_weights_are_those_of_the_tensors(name, make):
    model = make(name)
    work = workload_of(model.config)
    matrices = sum(
        p.numel() for n, p in model.named_parameters() if ".layers." in n and "norm" not in n and p.ndim == 2
    )
    assert work.layer_weights == matrices
    assert work.head_weights == model.get_output_embeddings().weight.numel()


@each
@makes
def test_cache_is_that_of_a_run(name, make):
    model = make(name)
    with torch.no_grad():
        cache = model(torch.arange(3, 13)[None], use_cache=True).cache
    elements = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert workload_of(model.config).cached * 10 == elements


@makes
def test_operations_are_those_that_torch_counts(make):
    """All but those that a causal mask makes needless: torch counts every pair of tokens."""
    model = make("llama")
    model.set_attn_implementation("eager")
    prompt = 24
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + prompt).repeat(2, 1), logits_to_keep=1)
    work = workload_of(model.config)
    needless = 2 * 2 * (prompt * (prompt - 1)) * work.attended
    assert counter.get_total_flops() == work.prefill_flops(2, prompt) + needless


def test_a_step_reads_every_weight_once_and_the_cache_of_every_sequence():
    work = workload_of(tiny_model("llama").config)
    weights = work.layer_weights + work.head_weights
    assert work.decode_bytes(1, 0, 4, 4) == 4 * weights
    assert work.decode_bytes(3, 100, 4, 2) == 4 * weights + 3 * 100 * 2 * work.cached
