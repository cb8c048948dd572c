"""Where a run rests on an accelerator, and that it takes no more of its memory than is counted."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import pytest
import torch
from support.accelerated import SHORT, TEXT, accelerator, assert_equal, dense, on_cpu, resting
from support.tiny import tiny_tokenizer
from support.virtual_device import BYTES
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen2Config

from selfpruner_hub import memory
from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.layer_stream import LAYER_BATCH_TOKENS
from selfpruner_hub.models.placement import streams
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.offload import MEMORY

__all__ = ["accelerator", "dense"]  # fixtures


def with_free(monkeypatch, *free):
    """Let the device have so many bytes free, one number for each time that it is asked."""
    numbers = iter(free)
    monkeypatch.setattr(memory, "free_memory", lambda _device: next(numbers))


@pytest.mark.parametrize("dense", ["llama", "gemma3", "phi3"], indirect=True)
def test_what_does_not_fit_rests_on_the_host(dense, accelerator, monkeypatch):
    """Weights stay on the device, all else is on the host; the pruned model moves to the device if it fits there."""
    settings = {**SHORT, "proposer": "evolution"}
    expected = on_cpu(dense, **settings)
    pruner = AutoPruner.from_pretrained(dense)
    working = memory.needs(pruner.model, resolve(None, **SHORT), 0.3).working
    for left in (0, 2 * working):
        with_free(monkeypatch, 1.2 * working, left)
        made = pruner.prune(0.3, data=TEXT, progress=False, **settings)
        assert resting(pruner.model) == {"gpu"}
        assert not streams(pruner.model)
        assert resting(made.model) == ({"gpu"} if left else {"cpu"})
        assert streams(made.model) == (not left)
        assert_equal(expected, made)


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_what_fits_nowhere_is_refused_before_anything_is_read(dense, accelerator, monkeypatch):
    pruner = AutoPruner.from_pretrained(dense)
    working = memory.needs(pruner.model, resolve(None, **SHORT), 0.3).working
    with_free(monkeypatch, 0.5 * working)
    with pytest.raises(ModelError, match=r"GiB beside the model.*--offload"):
        pruner.prune(0.3, data=TEXT, progress=False, **SHORT)
    with_free(monkeypatch, 1e12)
    assert memory.store_for(pruner.model, MEMORY, resolve(None), 0.3) is MEMORY


SMALLER = 64


def scaled(config, hidden, ffn, heads, groups, head_dim, **others):
    """A configuration of a model's proportions: its widths are `SMALLER` times smaller."""
    return config(
        hidden_size=hidden // SMALLER, intermediate_size=ffn // SMALLER, num_attention_heads=heads // 4,
        num_key_value_heads=groups // 4, head_dim=head_dim // 16, num_hidden_layers=4, vocab_size=128,
        max_position_embeddings=64, pad_token_id=0, dtype="bfloat16", **others,
    )  # fmt: skip


SCALED = {
    "Llama-3.1-8B": scaled(LlamaConfig, 4096, 14336, 32, 8, 128),
    "Qwen2.5-7B": scaled(Qwen2Config, 3584, 18944, 28, 4, 128),
    "Gemma-2-9B": scaled(Gemma2Config, 3584, 14336, 16, 8, 256),
    "Phi-4": scaled(Phi3Config, 5120, 17920, 40, 8, 128),  # of 10 groups
}


DEPTHS = {"Llama-3.1-8B": 32, "Qwen2.5-7B": 28, "Gemma-2-9B": 42, "Phi-4": 40}


def bytes_of(model):
    """Bytes of a model outside of its layers, of the weights of a layer, and of what one layer needs."""
    outside = sum(parameter.nbytes for key, parameter in model.named_parameters() if ".layers." not in key)
    layer, row = decoder_layers(model)[0], architecture_of(model.config)
    statistics = [4 * linear(layer, path).in_features ** 2 for path in (row.attention_output, row.ffn_output)]
    weights = sum(parameter.nbytes for parameter in layer.parameters())
    return outside, weights, weights + sum(statistics)


@pytest.fixture
def scaled_model(request, accelerator, tmp_path, monkeypatch):
    """A model of the proportions of a real one, saved, and batches that are smaller by as much."""
    smaller = LAYER_BATCH_TOKENS // SMALLER
    monkeypatch.setattr("selfpruner_hub.models.layer_stream.LAYER_BATCH_TOKENS", smaller)
    for module in ("models.forward", "evaluation.fitness"):
        monkeypatch.setattr(f"selfpruner_hub.{module}.BATCH_TOKENS", smaller)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SCALED[request.param])
    model.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return model


@contextmanager
def counted():
    """Count the bytes on the device; gives a list that gets their peak."""
    gc.collect()
    before, peak = BYTES.now, []
    BYTES.restart()
    yield peak
    peak.append(BYTES.peak - before)


@pytest.mark.parametrize(
    "scaled_model",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "Phi-4"), id=name) for name in SCALED],
    indirect=True,
)
def test_the_memory_of_a_streamed_run(scaled_model, request, tmp_path):
    """The device holds embeddings, head, and at most ten times what one layer needs, at the peak of all stages.

    The widest matrices are those of the second repair's step of gate_proj and up_proj. The depth adds nothing: at the
    depth of the real models, the peak is below 1.3 times the weights and five times what one layer needs.
    """
    outside, weights, needed = bytes_of(scaled_model)
    settings = {**SHORT, "proposer": "evolution"}
    with counted() as peak:
        pruner = AutoPruner.from_pretrained(str(tmp_path / "dense"), offload_folder=tmp_path / "scratch")
        made = pruner.prune(0.3, data=TEXT, progress=False, **settings)
        made.save_pretrained(tmp_path / "pruned")
    assert peak[0] <= outside + 10 * needed
    assert peak[0] <= 1.3 * (outside + DEPTHS[request.node.callspec.id] * weights) + 5 * needed
    assert made.model.device.type == "gpu"


@pytest.mark.parametrize(
    "scaled_model",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "Llama-3.1-8B"), id=name) for name in SCALED],
    indirect=True,
)
def test_the_memory_of_a_run_that_rests_on_the_host(scaled_model, tmp_path, monkeypatch):
    """The device holds the weights, and what `memory.needs` counts for the layer that is worked on."""
    outside, weights, _ = bytes_of(scaled_model)
    settings = {**SHORT, "proposer": "evolution"}
    with counted() as peak:
        pruner = AutoPruner.from_pretrained(str(tmp_path / "dense"))
        working = memory.needs(pruner.model, resolve(None, **SHORT), 0.3).working
        with_free(monkeypatch, 1.2 * working, 0)
        pruner.prune(0.3, data=TEXT, progress=False, **settings)
    assert peak[0] <= outside + len(decoder_layers(scaled_model)) * weights + working


def test_a_model_of_8_billion_weights_takes_20_gb_of_the_device():
    """Where its weights rest there and all else on the host; the bound of the work on a layer is held above."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert weights + memory.needs(model, resolve("default"), 0.3).working <= 20e9
