"""Stock configurations: tools that know the RoPE keys of transformers 4 alone find them, and nothing else changes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support.checks import logits
from support.tiny import CONFIGS, tiny_model, tiny_pruned
from test_rope import KINDS, parameters

from exporters.to_onnx.hub_layout import read_configuration, save_configurations
from selfpruner_hub.models.stock_config import rope_keys, save_model

CASES = {**{name: (name, {}) for name in CONFIGS}, **{kind: parameters(kind) for kind in KINDS}}
"""Every tiny configuration, and every kind of rotary embedding."""


@pytest.mark.parametrize("case", CASES)
def test_a_stock_model_has_the_former_keys_and_reloads_to_the_same(case, tmp_path):
    name, changes = CASES[case]
    model = tiny_model(name, **changes)
    save_model(model, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert {"rope_theta", "rope_scaling"} <= values.keys()
    without = {key: value for key, value in values.items() if key not in rope_keys(model.config)}
    assert "rope_parameters" in without
    read, plain = (type(model.config).from_dict(each) for each in (values, without))
    extra = {"partial_rotary_factor"} if name == "phi3" else set()  # its class also keeps it at the top level
    assert {key: value for key, value in read.to_dict().items() if key not in extra} == plain.to_dict()
    assert read.rope_parameters == model.config.rope_parameters


@pytest.mark.parametrize("case", CASES)
def test_the_former_keys_alone_say_the_same(case):
    """As tools read them that do not know `rope_parameters`."""
    name, changes = CASES[case]
    config = tiny_model(name, **changes).config
    values = {key: value for key, value in config.to_dict().items() if key != "rope_parameters"}
    read = type(config).from_dict({**values, **rope_keys(config)})
    expected = dict(config.rope_parameters)
    if name == "olmo3":  # transformers 4 had no sliding attention with another base
        assert read.rope_parameters["full_attention"] == expected["full_attention"]
    else:
        assert read.rope_parameters == expected


@pytest.mark.parametrize("case", CASES)
def test_the_hub_layout_has_them_too(case, tmp_path):
    name, changes = CASES[case]
    pruned = tiny_pruned(name, **changes)
    save_configurations(pruned, tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    keys = rope_keys(pruned.config)
    assert {key: values[key] for key in keys} == keys
    assert read_configuration(tmp_path).rope_parameters == pruned.config.rope_parameters


MLX = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "phi3", "cohere", "ernie4_5", "glm4", "granite", "hunyuan", "ministral3", "olmo2",
         "olmo3", "seed_oss", "smollm3"), 1e-4,
    ),
    "gemma": 5e-3, "gemma3": 5e-3,
}  # fmt: skip
"""Architectures that mlx-lm computes as transformers does: largest distance of a logit (its GELU is rounded)."""


@pytest.mark.parametrize("name", MLX)
def test_mlx_lm_computes_the_same(name, tmp_path):
    """Stock models, as uniform ones are, with a base of the rotary embedding that is no default of mlx-lm."""
    mlx = pytest.importorskip("mlx.core", reason='needs pip install "mlx[cpu]" mlx-lm')
    load = pytest.importorskip("mlx_lm.utils", reason="needs pip install mlx-lm").load_model
    rope = CONFIGS[name].to_dict()["rope_parameters"]
    for part in rope.values() if "full_attention" in rope else [rope]:
        part["rope_theta"] *= 7
    model, ids = tiny_model(name, rope_parameters=rope, intermediate_size=40), torch.arange(3, 27)[None]
    save_model(model, tmp_path)
    mlx.set_default_device(mlx.cpu)
    found = load(tmp_path)[0](mlx.array(ids.numpy()))
    assert np.abs(np.array(found.astype(mlx.float32)) - logits(model, ids).numpy()).max() <= MLX[name]
