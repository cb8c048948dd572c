"""On an accelerator, from loading to measuring: no tensor and no random generator is on the wrong device."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate.utils import send_to_device
from support.accelerated import SHORT, TEXT, accelerator, assert_equal, dense, on_cpu, resting, shallow
from support.tiny import CONFIGS, tiny_model, tiny_pruned, tiny_tokenizer
from support.virtual_device import MixedDevicesError, virtual_accelerator
from transformers import Trainer

from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.cli import main
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.recovery.recover import recover
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.recovery.task import Pair
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

__all__ = ["accelerator", "dense"]  # fixtures
WHEN = ("before", "after")
IDS = torch.randint(3, 128, (4, 16), generator=torch.Generator().manual_seed(0))


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
