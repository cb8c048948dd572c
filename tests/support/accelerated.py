"""Short runs on the virtual accelerator, and the same on a CPU to compare with."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.placement import stream_layers, streams
from selfpruner_hub.pruner import AutoPruner
from support.tiny import CONFIGS, tiny_model, tiny_tokenizer
from support.virtual_device import virtual_accelerator

LAYERS = 2
TEXT = ["The quick brown fox jumps over the lazy dog. " * 12]
SHORT = {
    "window": 16, "calibration_tokens": 128, "fisher_tokens": 64, "fitness_tokens": 64, "evaluations": 3,
    "schedule": {"crossover": 1, "mutation": 1}, "seeds": ("uniform", "sensitivity", "refined"),
}  # fmt: skip


@pytest.fixture
def accelerator(monkeypatch):
    """A machine with an accelerator, while the test lasts."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # the virtual device is there for one thread alone
    monkeypatch.setattr("selfpruner_hub.models.forward.ON_ACCELERATORS", 1)  # batches as on a CPU
    monkeypatch.setattr("accelerate.utils.memory.clear_device_cache", lambda **_: None)  # it takes seconds
    save = PreTrainedModel.save_pretrained

    def saved(model, *args, **kwargs):  # virtual tensors have no storage, which safetensors reads
        device = model.device
        save(model.to("cpu"), *args, **kwargs)
        stream_layers(model, device) if streams(model) else model.to(device)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", saved)
    with virtual_accelerator():
        yield


def shallow(name):
    layers = {"layer_types": CONFIGS[name].layer_types[:LAYERS]} if hasattr(CONFIGS[name], "layer_types") else {}
    return tiny_model(name, num_hidden_layers=LAYERS, **layers)


@pytest.fixture
def dense(request, tmp_path):
    """A tiny dense model of two layers, saved."""
    shallow(request.param).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return str(tmp_path / "dense")


def on_cpu(directory, **settings):
    return AutoPruner.from_pretrained(directory, device="cpu").prune(0.3, data=TEXT, progress=False, **settings)


def assert_equal(one, other):
    assert one.plan == other.plan
    fitness = [each.report.metrics["search_fitness"].value for each in (one, other)]
    assert fitness[0] == pytest.approx(fitness[1], rel=1e-4)
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), atol=2e-3, rtol=2e-2)


def resting(model):
    return {parameter.device.type for parameter in decoder_layers(model).parameters()}
