"""Rotary embeddings of every kind, in models whose layers differ in KV heads: reload, run, and generate."""

from __future__ import annotations

import pytest
import torch
from support.checks import check_cache, check_causality, logits
from support.tiny import tiny_model, tiny_pruned, uneven
from transformers import AutoModelForCausalLM

from selfpruner_hub.models.patching import working_on

SHORT = {"original_max_position_embeddings": 32}  # of the 40 tokens of IDS, the last lie beyond
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SHORT}
LINEAR = {"rope_type": "linear", "factor": 8.0}
FACTORS = {"short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}

KINDS = {
    "linear": ("llama", LINEAR),
    "llama3": ("llama", LLAMA3),
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 2.0}),
    "yarn": ("qwen2", {"rope_type": "yarn", "factor": 4.0, **SHORT}),
    "yarn-with-head-dim": ("qwen3", {"rope_type": "yarn", "factor": 4.0, **SHORT}),
    "longrope": ("phi3", {"rope_type": "longrope", **FACTORS, **SHORT}),
    "longrope-partial": (
        "phi3",
        {"rope_type": "longrope", "short_factor": [1.5], "long_factor": [4.0], "partial_rotary_factor": 0.5, **SHORT},
    ),
    "kinds-by-layer": (
        "gemma3",
        {
            "full_attention": {"rope_theta": 1e6, **LINEAR},
            "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
        },
    ),
}
"""Architecture and `rope_parameters` of each kind; Phi-3 with half of each head rotated is Phi-4-mini."""
IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))


def parameters(kind):
    name, rope = KINDS[kind]
    changes = {"max_position_embeddings": 32 if kind == "dynamic" else 128}
    nested = any(isinstance(value, dict) for value in rope.values())
    return name, {**changes, "rope_parameters": rope if nested else {"rope_theta": 1e4, **rope}}


@pytest.mark.parametrize("kind", KINDS)
def test_reloads_runs_and_generates_with_kv_heads_by_layer(kind, tmp_path):
    name, changes = parameters(kind)
    pruned = tiny_pruned(name, **changes)
    assert len({layer.num_key_value_heads for layer in pruned.config.per_layer_config}) > 1
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), logits(pruned, IDS))
    check_causality(again, IDS[:, :24])  # longer, the frequencies of some kinds follow the length
    check_cache(again, IDS[:, :4])


@pytest.mark.parametrize("kind", KINDS)
def test_rotates_as_the_dense_model_does(kind):
    """Within the trained length and beyond it, also where the dense model ran beyond it before it was cut."""
    name, changes = parameters(kind)
    dense = tiny_model(name, **changes)
    logits(dense, IDS)
    pruned, dense = uneven(dense), tiny_model(name, **changes)
    layer_types = sorted(set(dense.config.layer_types)) if kind == "kinds-by-layer" else [None]
    for length in (24, 40, 24):
        for layer_type in layer_types:
            assert torch.equal(rotation(pruned, length, layer_type), rotation(dense, length, layer_type))


@pytest.mark.parametrize("kind", KINDS)
def test_work_on_a_model_begins_with_the_frequencies_of_its_configuration(kind):
    """Whatever dtype it was converted to, and however long a text it has read."""
    name, changes = parameters(kind)
    model, fresh = tiny_model(name, **changes), tiny_model(name, **changes)
    logits(model, IDS)
    with working_on(model.to(torch.bfloat16).to(torch.float32)):
        layer_types = sorted(set(model.config.layer_types)) if kind == "kinds-by-layer" else [None]
        for length in (36, 24, 40):
            for layer_type in layer_types:
                assert torch.equal(rotation(model, length, layer_type), rotation(fresh, length, layer_type))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_matters(kind):
    name, changes = parameters(kind)
    layer_type = "full_attention" if kind == "kinds-by-layer" else None
    ours, default = (rotation(model, 40, layer_type) for model in (tiny_pruned(name, **changes), tiny_model(name)))
    assert ours.shape != default.shape or not torch.allclose(ours, default)


def rotation(model, length, layer_type):
    """Cosines and sines of the first positions."""
    words = () if layer_type is None else (layer_type,)
    return torch.stack(model.get_decoder().rotary_emb(torch.zeros(1, length, 1), torch.arange(length)[None], *words))
