"""On an accelerator, from loading to measuring: no tensor and no random generator is on the wrong device."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager

import pytest
import torch
from accelerate.utils import send_to_device
from support.tiny import CONFIGS, tiny_model, tiny_pruned, tiny_tokenizer
from support.virtual_device import BYTES, MixedDevicesError, virtual_accelerator
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Trainer,
)

from selfpruner_hub import memory
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.cli import main
from selfpruner_hub.errors import ModelError
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.layer_stream import LAYER_BATCH_TOKENS
from selfpruner_hub.models.placement import stream_layers, streams
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.recovery.recover import Pair, recover
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.offload import MEMORY
from selfpruner_hub.storage.run import Run

LAYERS = 2
WHEN = ("before", "after")
TEXT = ["The quick brown fox jumps over the lazy dog. " * 12]
SHORT = {
    "window": 16, "calibration_tokens": 128, "fisher_tokens": 64, "fitness_tokens": 64, "evaluations": 3,
    "schedule": {"crossover": 1, "mutation": 1}, "seeds": ("uniform", "sensitivity", "refined"),
}  # fmt: skip
IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


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


@pytest.mark.parametrize("dense", CONFIGS, indirect=True)
def test_pruned_resumed_reloaded_and_measured(dense, accelerator, tmp_path):
    settings = {**SHORT, "proposer": "evolution"}
    made = AutoPruner.from_pretrained(dense).prune(
        0.3, data=TEXT, run_dir=tmp_path / "run", progress=False, **settings
    )  # fmt: skip
    assert made.model.device.type == "gpu"
    told = []
    pruner = AutoPruner.from_pretrained(dense)
    again = pruner.prune(
        0.3, data=TEXT, run_dir=tmp_path / "run", progress=lambda what, *_: told.append(what), **settings
    )  # fmt: skip
    assert not {"sensitivities", "repairing"} & set(told)  # all of it was loaded
    assert_equal(again, made)
    assert_equal(on_cpu(dense, **settings), made)
    made.save_pretrained(tmp_path / "pruned")
    loaded = PrunedModel.from_pretrained(tmp_path / "pruned")
    assert {parameter.device.type for parameter in loaded.model.parameters()} == {"gpu"}
    teacher = teach(pruner.model, IDS)
    assert divergence(loaded.model, IDS, teacher) == pytest.approx(divergence(made.model, IDS, teacher), rel=1e-4)
    assert perplexity(loaded.model, IDS) == pytest.approx(perplexity(again.model, IDS), rel=1e-4)


def resting(model):
    return {parameter.device.type for parameter in decoder_layers(model).parameters()}


@pytest.mark.parametrize("dense", ["llama", "gemma3", "phi3"], indirect=True)  # apart, normalised outputs, fused
def test_streamed_layer_by_layer(dense, accelerator, tmp_path):
    """Weights are in files, and a layer is on the device while it works; the result is that of a CPU."""
    settings = {**SHORT, "proposer": "evolution"}
    told = []
    for _ in range(2):
        pruner = AutoPruner.from_pretrained(dense, offload_folder=tmp_path / "scratch")
        assert pruner.model.device.type == "gpu"
        told.clear()
        made = pruner.prune(0.3, data=TEXT, run_dir=tmp_path / "run", progress=lambda *a: told.append(a[0]), **settings)
        assert resting(pruner.model) == resting(made.model) == {"cpu"}
    assert not {"sensitivities", "repairing"} & set(told)  # all of it was loaded
    assert_equal(on_cpu(dense, **settings), made)
    before = perplexity(made.model, IDS)
    made.save_pretrained(tmp_path / "pruned")
    assert perplexity(PrunedModel.from_pretrained(tmp_path / "pruned").model, IDS) == pytest.approx(before, rel=1e-4)
    assert perplexity(made.to("gpu").model, IDS) == pytest.approx(before, rel=1e-4)
    assert resting(made.model) == {"gpu"}


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


@pytest.mark.parametrize("scaled_model", ["Llama-3.1-8B"], indirect=True)
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


@pytest.mark.parametrize(
    ("dense", "proposer"),
    [("llama", "evolution"), ("llama", "random"), ("llama", "slopes"), ("gemma3", "slopes"), ("phi3", "slopes")],
    indirect=["dense"],
)
def test_the_papers_preset_scores_as_on_a_cpu(dense, proposer, accelerator):
    settings = {**SHORT, "preset": "paper", "schedule": {**SHORT["schedule"], "population": 2}, "proposer": proposer}
    made = AutoPruner.from_pretrained(dense).prune(0.3, data=TEXT, progress=False, **settings)
    assert_equal(on_cpu(dense, **settings), made)


def test_a_fitness_without_a_teacher_sizes_its_batches_on_the_dense_model(accelerator):
    one, near = Plan.of([30, 40], [2, 4]), Plan.of([30, 41], [2, 3])
    scores = []
    for device in ("cpu", "gpu"):
        slicer = Slicer(model := shallow("llama").to(device))
        fitness = Fitness(slicer, IDS, "perplexity")
        scores.append([fitness(one), fitness(near)])
        assert model.device.type == device
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_the_model_writes_its_text_and_proposes(dense, accelerator):
    settings = {**SHORT, "window": 8, "calibration_tokens": 64, "fitness_tokens": 16, "seeds": ("uniform",)}
    made = AutoPruner.from_pretrained(dense).prune(0.3, data="self", proposer="self", progress=False, **settings)
    assert made.model.device.type == "gpu"
    assert made.report.proposer["tokens"]


@pytest.mark.parametrize("dense", ["llama"], indirect=True)
def test_the_command_line(dense, accelerator, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(TEXT[0])
    given = [word for name, value in SHORT.items() for word in ("--set", f"{name}={value}") if name != "evaluations"]
    given = [word.replace("(", "[").replace(")", "]").replace("'", '"') for word in given]
    given = [*given, "--evaluations", "0", "--data", str(text), "--beta", "0.3", "--output", str(tmp_path / "pruned")]
    assert main(["prune", dense, *given]) == 0
    assert capsys.readouterr().err.startswith("dense on gpu:0, float32")
    measured = ["evaluate", str(tmp_path / "pruned"), "--against", dense, "--data", str(text), "--window", "16"]
    found = {}
    for device in ("cpu", "gpu"):
        assert main([*measured, "--device", device, "--json"]) == 0
        out, err = capsys.readouterr()
        assert f"pruned on {device}" in err
        found[device] = {name: each["value"] for name, each in json.loads(out)["metrics"].items()}
    assert found["gpu"] == pytest.approx(found["cpu"], rel=1e-3)
    assert main([*measured, "--device", "cuda"]) == 2
    assert "There is no device 'cuda' here. Choose one of: cpu, gpu:0." in capsys.readouterr().err


def test_recovery_on_an_accelerator_as_on_a_cpu(accelerator, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", lambda *_: None)  # it would pickle virtual tensors
    found = {}
    for device in ("cpu", "gpu"):
        if device == "gpu":
            monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "gpu")  # accelerate knows no device of this name
        pair = Pair(tiny_pruned("llama").to(device), tiny_model("llama").to(device), tiny_tokenizer())
        run = Run(checkpoints=Checkpoints(tmp_path / device / "stages"))
        settings = resolve_recovery(window=32, batch_tokens=64, learning_rate=2e-3, warmup=2, checks=1)
        found[device] = recover(
            pair, RecoveryBudget(tokens=64 * 8), TEXT * 4, settings, run, tmp_path / device / "training"
        )
    assert {parameter.device.type for parameter in found["gpu"].model.parameters()} == {"gpu"}
    before, after = ([[text[when] for text in each.record["deciding"]] for each in found.values()] for when in WHEN)
    assert before[1] == pytest.approx(before[0], rel=1e-3)
    assert after[1] == pytest.approx(after[0], rel=1e-2)


def spread(model):
    """Put the second layer and the head on the device, as `device_map` does: what a module reads goes to its device."""
    for module, device in ((decoder_layers(model)[1], "gpu"), (model.model.norm, "cpu"), (model.lm_head, "gpu")):
        module.to(device).register_forward_pre_hook(
            lambda _module, args, kwargs, device=device: send_to_device((args, kwargs), device), with_kwargs=True
        )
    return model


def test_a_model_that_is_spread_over_devices_writes_the_same(accelerator):
    """In batches that finished sequences leave."""
    prompts, ends = [[5, 9], [3], [17, 4, 8], [40]], set(range(3, 40))
    model = shallow("llama")
    wanted = continuations(model, prompts, 8, ends=ends, seed=1)
    assert len({len(ids) for ids in wanted}) > 1
    assert continuations(spread(model), prompts, 8, ends=ends, seed=1) == wanted


def test_the_virtual_accelerator_notices_what_is_on_the_wrong_device():
    x = torch.ones(3)
    with virtual_accelerator():
        y = x.to("gpu")
        with pytest.raises(MixedDevicesError):
            x + y
        with pytest.raises(MixedDevicesError):
            torch.rand(3, device="gpu", generator=torch.Generator())
        with pytest.raises(MixedDevicesError):
            y.double()
        assert (y + y).cpu().tolist() == (2 * y).tolist() == [2, 2, 2]
    assert torch.accelerator.current_accelerator(check_available=True) is None
