"""Recovery in two processes, as `accelerate launch` starts them, is that of one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import become, launched
from support.tiny import tiny_model, tiny_tokenizer
from transformers import TrainerControl, TrainerState

from selfpruner_hub import ranks
from selfpruner_hub.cli import main
from selfpruner_hub.errors import UserError
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.recovery import distiller, divergence
from selfpruner_hub.recovery.process import check_processes
from selfpruner_hub.recovery.settings import resolve_recovery
from selfpruner_hub.storage.checkpoints import Checkpoints, Clock

CONFIG = Path(__file__).parents[2] / "examples" / "fsdp.yaml"
STEPS = 6
SETTINGS = ("window=32", "batch_tokens=128", "learning_rate=2e-4", "checks=3", "rank=4")
FAILED = 9


def with_fsdp() -> dict[str, str]:
    """What `accelerate launch` gives its processes by the configuration; on CPUs, in place of GPUs."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    words = ["--config_file", str(CONFIG), "--num_processes", "2", "-m", "selfpruner_hub.cli"]
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    return {**prepare_multi_gpu_env(arguments), "ACCELERATE_TORCH_DEVICE": "cpu"}


def words_of(folder: Path, name: str, *more: str) -> list[str]:
    """The command line of a recovery; its output and its run directory are named after it."""
    words = ["recover", folder / "pruned", "--against", folder / "dense", "--data", f"self+{folder / 'text.txt'}"]
    words += ["--tokens", 128 * STEPS, "--output", folder / name, "--run-dir", folder / f"{name}-run"]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [str(word) for word in (*words, *settings, "--device", "cpu", *more)]


def run(env: dict[str, str], words: list[str], log: Path, fails_at: int | None) -> None:
    """One process of a launcher."""
    become(env, log.with_suffix(".out"), log.with_suffix(".err"))
    torch.set_num_threads(1)
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def fail(progress, what, done, *_):
        if done == fails_at:
            os._exit(FAILED)

    Checkpoints.clear = lambda _: None  # what was trained is looked at
    if fails_at is not None:
        distiller.noted = fail
    if "ACCELERATE_USE_FSDP" in env:  # accelerate knows FSDP on accelerators alone
        PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    sys.exit(main(words))


def start(folder: Path, name: str, *more: str, fsdp: bool = False, fails_at: int | None = None) -> list[int]:
    """Recover in two processes, of which the second one may fail at a step; returns their exit codes."""
    words = words_of(folder, name, *more)
    given = [(words, folder / f"{name}-{rank}", step) for rank, step in enumerate((None, fails_at))]
    return launched(run, given, {**os.environ, **(with_fsdp() if fsdp else {})})


def history(folder: Path, name: str) -> list[dict[str, float]]:
    """What the training has logged until its last checkpoint."""
    states = (folder / f"{name}-run").rglob(distiller.STATE)
    return json.loads(max(states, key=lambda path: int(path.parent.name.split("-")[1])).read_text())["log_history"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, dense = tmp_path_factory.mktemp("ranks"), tiny_model("mistral", num_hidden_layers=2)
    dense.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    AutoPruner(dense, tiny_tokenizer(), "tests/mistral", {"license": "mit"}).prune(
        0.3, data="self", window=32, calibration_tokens=512, fitness_tokens=128, evaluations=0, seeds=("uniform",),
        repair="none", progress=False,
    ).save_pretrained(folder / "pruned")  # fmt: skip
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    return folder


@pytest.fixture
def alone(folder, monkeypatch):
    """Recover in this process."""
    monkeypatch.setattr(Checkpoints, "clear", lambda _: None)
    return lambda name, *more: main([*words_of(folder, name, *more), "--quiet"])


def assert_same(folder: Path, name: str, alone: str) -> None:
    """The same losses of all steps, whatever was resumed, the same weights and the same record."""
    for entry, other in zip(history(folder, name), history(folder, alone), strict=True):
        assert entry == pytest.approx(other, rel=1e-3)
    before, mine, theirs = (load_file(folder / each / "model.safetensors") for each in ("pruned", name, alone))
    assert max((theirs[key] - before[key]).abs().max() for key in before) > 2e-4
    assert {key: value for key, value in theirs.items() if (mine[key] - value).abs().max() > 1e-5} == {}
    records = [json.loads((folder / each / "selfpruner.json").read_text())["recovery"] for each in (name, alone)]
    for field in ("method", "steps", "tokens", "stopped", "texts", "settings"):
        assert records[0][field] == records[1][field]
    for mine, theirs in zip(*(record["deciding"] for record in records), strict=True):
        assert mine == pytest.approx(theirs, abs=2e-5)
    assert "KL from the parent on self" in (folder / f"{name}-0.out").read_text()
    assert (folder / f"{name}-1.out").read_text() == ""
    assert "recovering" in (folder / f"{name}-0.err").read_text()
    assert "recovering" not in (folder / f"{name}-1.err").read_text()


@pytest.mark.heavy
def test_fsdp_that_fails_and_resumes_is_one_process(folder, alone):
    assert alone("whole") == 0
    assert start(folder, "sharded", fsdp=True, fails_at=3) == [1, FAILED]
    assert "selfpruner: Another process has ended." in (folder / "sharded-0.err").read_text()
    assert start(folder, "sharded", fsdp=True) == [0, 0]
    assert list((folder / "sharded-run").rglob("pytorch_model_fsdp_0/.metadata"))
    assert_same(folder, "sharded", "whole")


@pytest.mark.heavy
def test_adapters_in_two_processes_are_those_of_one(folder, alone):
    adapters = ("--set", "method=lora", "--set", "learning_rate=1e-3")
    assert alone("lora", *adapters) == 0
    assert start(folder, "loras", *adapters) == [0, 0]
    assert_same(folder, "loras", "lora")


@pytest.mark.heavy
def test_what_the_first_process_refuses_is_one_line(folder):
    assert start(folder, "refused", "--data", "no such file.txt") == [2, 2]
    assert (folder / "refused-0.err").read_text().count("no such file.txt") == 1
    assert "selfpruner: " not in (folder / "refused-1.err").read_text()


def test_a_mistake_is_told_by_the_first_process(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["recover", "no such model", "--against", "parent", "--minutes", "1"]) == 2
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("identity", "batch", "adapters", "told"),
    [
        ("a", 3, False, "3 windows cannot be divided over 2 processes. Set batch_tokens=128."),
        ("a", 1, False, "1 windows cannot be divided over 2 processes. Set batch_tokens=64."),
        ("a", 2, True, "Adapters are not trained with FSDP"),
        ("b", 2, False, "differ in models"),
    ],
)
def test_what_processes_cannot_do_together(identity, batch, adapters, told, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "sharded", lambda: True)
    monkeypatch.setattr(ranks, "from_first", lambda _: "a")
    monkeypatch.setattr(ranks, "largest", lambda value, _: value)
    with pytest.raises(UserError, match=told):
        check_processes(torch.device("cpu"), identity, batch, 32, adapters)


def test_fsdp1_is_refused(monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="fsdp_version: 2"), ranks.joined("cpu"):
        pass


def test_the_halves_of_a_batch_average_to_the_whole(monkeypatch):
    """Whatever the halves weigh: one has fewer answers."""
    parent, student = tiny_model("llama"), tiny_model("llama", seed=1)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 128, (4, 16), generator=generator)
    counted = torch.rand(4, 15, generator=generator) > torch.tensor([[0.1], [0.2], [0.9], [0.7]])
    batch = {"input_ids": ids, "counted": counted}
    halves = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 2), slice(2, 4))]

    def results(batch):
        return divergence.distilled(student, student, parent, batch, torch.float32)

    whole = results(batch)
    whole.backward()
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    sums = []
    monkeypatch.setattr(divergence, "averaged", lambda values: sums.append(values) or values)
    for half in halves:
        results(half)
    monkeypatch.setattr(divergence, "averaged", lambda _: sum(sums) / 2)
    parts = [results(half) for half in halves]
    for loss in parts:
        (loss / 2).backward()
    torch.testing.assert_close(sum(parts) / 2, whole)
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-6, msg=key)


def test_a_process_stops_where_another_one_is_interrupted(monkeypatch):
    told = []
    monkeypatch.setattr(ranks, "largest", lambda value, _: told.append(value) or distiller.REASONS.index("interrupted"))
    pace = distiller.Pace(None, lambda *_: None, Clock(Checkpoints()))
    arguments = distiller.arguments(Path("unused"), torch.device("cpu"), 8, 1, 1, resolve_recovery())
    control = TrainerControl()
    pace.on_step_end(arguments, TrainerState(global_step=3, max_steps=8), control)
    assert told == [0]
    assert pace.stopped == distiller.INTERRUPTED
    assert control.should_training_stop
    assert control.should_save
