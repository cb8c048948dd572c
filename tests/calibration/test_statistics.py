"""Streamed moments equal those of all inputs at once."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model

import selfpruner_hub.models.layer_stream as streams
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.errors import ModelError
from selfpruner_hub.storage.run import Run

WINDOWS = torch.randint(3, 128, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_moments_equal_those_of_all_inputs(name, monkeypatch):
    monkeypatch.setattr(streams, "LAYER_BATCH_TOKENS", 48)  # three windows a batch
    model, seen = tiny_model(name), {}
    for index, layer in enumerate(model.model.layers):
        for part, module in (("attention", layer.self_attn.o_proj), ("ffn", layer.mlp.down_proj)):
            module.register_forward_pre_hook(lambda _m, x, key=(index, part): seen.setdefault(key, []).append(x[0]))
    told = []
    statistics = calibrate(model, WINDOWS, Run(progress=lambda *args: told.append(args)))
    assert told[-1] == ("calibrating", 4, 4)
    for (index, part), inputs in seen.items():
        x = torch.cat([i.flatten(0, 1) for i in inputs]).double()
        moments = getattr(statistics[index], part)
        assert len(x) == WINDOWS.numel()
        torch.testing.assert_close(moments.gram.double(), x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.mean.double(), x.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(moments.variance.double(), x.var(0, unbiased=False), atol=1e-5, rtol=1e-3)


def test_bfloat16_statistics_are_those_of_its_float32_values():
    model = tiny_model("llama").bfloat16()
    inputs = []
    model.model.layers[2].mlp.down_proj.register_forward_pre_hook(lambda _m, x: inputs.append(x[0].flatten(0, 1)))
    gram = calibrate(model, WINDOWS)[2].ffn.gram
    x = torch.cat(inputs).double()
    torch.testing.assert_close(gram.double(), x.t() @ x / len(x), atol=1e-5, rtol=1e-4)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"


def test_hooks_are_gone_afterwards():
    model = tiny_model("llama")
    calibrate(model, WINDOWS)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        calibrate(model, WINDOWS)
