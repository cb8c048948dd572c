"""On an accelerator, from loading to measuring: no tensor and no random generator is on the wrong device."""

from __future__ import annotations

import json

import pytest
import torch
from support.tiny import CONFIGS, tiny_model, tiny_tokenizer
from support.virtual_device import MixedDevicesError, virtual_accelerator
from transformers import PreTrainedModel

from selfpruner_hub.cli import main
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.placement import stream_layers, streams
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.slicing import Slicer

LAYERS = 2
TEXT = ["The quick brown fox jumps over the lazy dog. " * 12]
SHORT = {
    "window": 16, "calibration_tokens": 128, "fisher_tokens": 64, "fitness_tokens": 64, "evaluations": 3,
    "crossover": 1, "mutation": 1, "seeds": ("uniform", "sensitivity"),
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
    assert not {"sensitivities", "calibrating", "ordering", "repairing"} & set(told)  # all of it was loaded
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
    assert not {"sensitivities", "calibrating", "ordering", "repairing"} & set(told)  # all of it was loaded
    assert_equal(on_cpu(dense, **settings), made)
    before = perplexity(made.model, IDS)
    made.save_pretrained(tmp_path / "pruned")
    assert perplexity(PrunedModel.from_pretrained(tmp_path / "pruned").model, IDS) == pytest.approx(before, rel=1e-4)
    assert perplexity(made.to("gpu").model, IDS) == pytest.approx(before, rel=1e-4)
    assert resting(made.model) == {"gpu"}


@pytest.mark.parametrize("dense", ["llama", "gemma3", "phi3"], indirect=True)
@pytest.mark.parametrize("proposer", ["evolution", "slopes", "random"])
def test_the_papers_preset_scores_as_on_a_cpu(dense, proposer, accelerator):
    settings = {**SHORT, "preset": "paper", "population": 2, "proposer": proposer}
    made = AutoPruner.from_pretrained(dense).prune(0.3, data=TEXT, progress=False, **settings)
    assert_equal(on_cpu(dense, **settings), made)


def test_a_trial_of_batch_sizes_is_not_among_the_recorded_states(accelerator):
    """A fitness without a teacher runs no model before its first candidate, which records its hidden states."""
    one, near = Plan.of([30, 40], [2, 4]), Plan.of([30, 41], [2, 3])
    scores = []
    for device in ("cpu", "gpu"):
        slicer = Slicer(model := shallow("llama").to(device), [], None)
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
