"""Recovery from end to end, on tiny models: it helps, it never harms, it stops and resumes."""

from __future__ import annotations

import copy
import os
import random
import signal
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from support.chatting import chat_tokenizer
from support.tiny import CONFIGS, DISTINCT, shallow, tiny_model, tiny_pruned, tiny_tokenizer

from selfpruner_hub.errors import DataError, MissingExtraError, OutputError, UserError
from selfpruner_hub.recovery import deciding, distiller, divergence, texts
from selfpruner_hub.recovery.deciding import is_better, score
from selfpruner_hub.recovery.recover import curve, recover
from selfpruner_hub.recovery.schedule import planned
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.recovery.task import Pair
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

TEXT = ["The quick brown fox jumps over the lazy dog. " * 200]
STEPS = 12
SETTINGS = {"window": 32, "batch_tokens": 128, "learning_rate": 2e-3, "warmup": 2, "checks": 3}


def recovered(
    pair, folder, *, steps=STEPS, data=TEXT, progress=lambda what, done, total: None, budget=None, **settings
):
    run = Run(checkpoints=Checkpoints(folder / "stages"), progress=progress)
    wanted = resolve_recovery(**{**SETTINGS, **settings})
    return recover(pair, budget or RecoveryBudget(tokens=128 * steps), data, wanted, run, folder / "training")


@pytest.fixture
def pair():
    return Pair(tiny_pruned("llama"), tiny_model("llama"), tiny_tokenizer())


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, values):
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())


def test_it_is_nearer_to_its_parent_and_nothing_else_changes(pair, tmp_path):
    before = weights(pair.pruned), weights(pair.parent)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = recovered(pair, tmp_path)
    assert all(text["after"] < text["before"] for text in found.record["deciding"])
    assert [text["name"] for text in found.record["deciding"]] == ["self", "list"]
    assert found.record["tokens"] == 128 * STEPS
    assert found.record["method"] == "full"
    assert found.record["curve"][-1][0] == 128 * STEPS
    assert found.record["curve"][-1][1] < found.record["curve"][0][1]
    for model, kept in zip(pair[:2], before, strict=True):
        assert_same(model, kept)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert not found.model.training
    for name in ("use_cache", "dtype"):  # Trainer turns the cache off
        assert getattr(found.model.config, name) == getattr(pair.pruned.config, name)
    assert {type(each) for each in vars(found.model).values()}.isdisjoint({type(lambda: 0)})  # accelerate's wrappers
    copy.deepcopy(found.model)(torch.tensor([[5, 6]]))


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in CONFIGS), *((name, "lora") for name in DISTINCT)]
)
def test_every_architecture(name, method, tmp_path):
    dense = tiny_model(name, num_hidden_layers=2, **kinds(name))
    found = recovered(
        Pair(shallow(name), dense, tiny_tokenizer()), tmp_path, steps=4, method=method, rank=4, checks=1
    )  # fmt: skip
    assert found.model is not None
    assert found.record["method"] == method
    assert {parameter.dtype for parameter in found.model.parameters()} == {torch.float32}


def test_the_seed_of_adapters_is_that_of_the_run(pair, tmp_path):
    models = []
    for state in (1, 2):
        torch.manual_seed(state)
        models.append(recovered(pair, tmp_path / str(state), method="lora", rank=4, checks=1).model)
    assert_same(models[0], weights(models[1]))


def kinds(name):
    layers = getattr(CONFIGS[name], "layer_types", None)
    return {"layer_types": layers[:2]} if layers else {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_checkpoints_of_half_precision(dtype, pair, tmp_path):
    for model in pair[:2]:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    found = recovered(pair, tmp_path)
    assert found.model is not None
    assert {parameter.dtype for parameter in found.model.parameters()} == {dtype}
    assert found.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_ctrl_c_is_as_before_afterwards(pair, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    recovered(pair, tmp_path)
    assert signal.getsignal(signal.SIGINT) is handler


def test_what_is_not_better_is_not_taken(pair, tmp_path):
    before = weights(pair.pruned)
    found = recovered(pair, tmp_path, learning_rate=1.0)
    assert found.model is None
    assert "did not improve the model: KL " in found.line
    assert_same(pair.pruned, before)


def test_poor_text_is_judged_by_what_the_parent_writes(pair, tmp_path):
    """Trained on one sentence until that is all it knows: nearer there, farther everywhere else."""
    found = recovered(pair, tmp_path, steps=60, learning_rate=2e-2)
    own, given = found.record["deciding"]
    assert given["after"] < given["before"]
    assert own["after"] > own["before"]
    assert found.model is None


@pytest.mark.parametrize("place", [2, 7])
def test_a_loss_that_is_no_number_ends_it(place, pair, tmp_path, monkeypatch):
    calls, real = [], divergence.distillation_loss

    def broken(*given):
        calls.append(0)
        return real(*given) * (torch.nan if len(calls) == place else 1)

    monkeypatch.setattr(divergence, "distillation_loss", broken)
    found = recovered(pair, tmp_path)
    assert found.record["stopped"] == distiller.BROKEN
    assert len(calls) == place
    assert (found.model is None) == (place == 2)  # the state of step 4 was measured, and is kept
    if found.model is not None:
        assert all(value.isfinite().all() for value in found.model.state_dict().values())


def test_ctrl_c_returns_the_best_so_far(pair, tmp_path):
    def interrupt(what, done, total):
        if what == "recovering" and done == 6:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    found = recovered(pair, tmp_path, progress=interrupt)
    assert (found.record["stopped"], found.record["steps"]) == (distiller.INTERRUPTED, 7)
    assert found.model is not None
    assert "(stopped: interrupted)" in found.line
    assert sum(text["tokens_read"] for text in found.record["texts"]) == found.record["tokens"] == 7 * 128
    assert signal.getsignal(signal.SIGINT) is handler


def test_it_ends_in_time(pair, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(distiller.time, "monotonic", lambda: now[0])

    def tick(what, done, total):
        now[0] += 10.0 if what == "recovering" else 0.0  # each step takes ten seconds

    monkeypatch.setattr("selfpruner_hub.recovery.task.step_seconds", lambda *_: 5.0)  # and half of it was expected
    found = recovered(pair, tmp_path, progress=tick, budget=RecoveryBudget(minutes=2))
    assert found.record["stopped"] == distiller.LATE
    assert found.record["steps"] == 14


class Stopped(Exception):  # noqa: N818
    """What ends a process, without a signal."""


@pytest.mark.parametrize(("stops_at", "found_in"), [(None, 1.9), (6, 1.9)])
def test_time_that_the_writing_did_not_take_is_for_the_steps(stops_at, found_in, pair, tmp_path, monkeypatch):
    """Also for those of a resumed recovery."""
    now, busy, short, training = [0.0], [0.0], RecoveryBudget(minutes=1), texts.Writer.training

    def loaded(*args):
        now[0] += busy[0]
        return training(*args)

    monkeypatch.setattr(texts.Writer, "training", loaded)
    monkeypatch.setattr(distiller.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("selfpruner_hub.recovery.task.step_seconds", lambda *_: 8.0)
    monkeypatch.setattr("selfpruner_hub.recovery.task.planned", lambda _budget, *sizes: planned(short, *sizes))

    def tick(what, done, total):
        now[0] += 8.0 if what == "recovering" else 0.0
        if what == "recovering" and done == stops_at:
            raise Stopped

    with nullcontext() if stops_at is None else pytest.raises(Stopped):
        recovered(pair, tmp_path, progress=tick, budget=RecoveryBudget(minutes=2))
    stops_at, busy[0] = None, 20.0  # a resumed recovery may take its time for the same texts
    found = recovered(pair, tmp_path, progress=tick, budget=RecoveryBudget(minutes=2))
    assert not found.record["stopped"]
    assert found.record["steps"] == 12
    assert found.record["minutes"] == found_in


@pytest.mark.parametrize("step", [1, 5, 11])
def test_what_was_stopped_resumes_to_the_same_model(step, pair, tmp_path):
    whole = recovered(pair, tmp_path / "whole")

    def stop(what, done, total):
        if what == "recovering" and done == step:
            raise Stopped

    with pytest.raises(Stopped):
        recovered(pair, tmp_path / "stopped", progress=stop)
    steps = []
    again = recovered(
        pair, tmp_path / "stopped", progress=lambda what, done, *_: steps.append(done) if what == "recovering" else None
    )
    assert steps[0] == {1: 1, 5: 5, 11: 9}[step]
    assert_same(again.model, weights(whole.model))
    assert {**again.record, "minutes": 0} == {**whole.record, "minutes": 0}


def test_a_resumed_recovery_trains_what_it_trained_before(pair, tmp_path, monkeypatch):
    """Even where no memory is free by now."""

    def stop(what, done, total):
        if what == "recovering":
            raise Stopped

    with pytest.raises(Stopped):
        recovered(pair, tmp_path, progress=stop)
    monkeypatch.setattr("selfpruner_hub.recovery.trainable.USABLE_MEMORY", 0.0)
    assert recovered(pair, tmp_path).record["method"] == "full"
    assert recovered(pair, tmp_path / "anew").record["method"] == "lora"


def test_a_launcher_changes_no_dtype(pair, tmp_path, monkeypatch):
    """A float32 model is trained in float32, whatever `accelerate launch` is configured for."""
    wanted = recovered(pair, tmp_path / "alone")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_same(recovered(pair, tmp_path / "launched").model, weights(wanted.model))


def test_adapters_without_their_package_are_refused_before_text_is_written(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setattr(texts.Writer, "deciding", lambda _: pytest.fail("wrote text"))
    with pytest.raises(MissingExtraError, match="peft"):
        recovered(pair, tmp_path, method="lora")


def test_a_half_written_checkpoint_is_not_read(pair, tmp_path):
    whole = recovered(pair, tmp_path)
    (training,) = (tmp_path / "training").iterdir()
    newest = distiller.last_checkpoint(training)
    (Path(newest) / distiller.STATE).unlink()
    again = recovered(pair, tmp_path)
    assert_same(again.model, weights(whole.model))


def test_another_model_or_setting_does_not_resume(pair, tmp_path):
    first = recovered(pair, tmp_path)
    other = recovered(pair, tmp_path, learning_rate=1e-3)
    assert other.record["learning_rate"] == 1e-3
    assert other.record["curve"] != first.record["curve"]


def test_a_full_disk_is_one_line(pair, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(distiller.Distiller, "_save_checkpoint", full)
    before = weights(pair.pruned)
    with pytest.raises(OutputError, match="No space left on device.*the same command resumes"):
        recovered(pair, tmp_path)
    assert_same(pair.pruned, before)


def test_a_chat_model_reads_conversations_and_questions(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "DECIDING_WINDOWS", 2)
    found = recovered(pair._replace(tokenizer=chat_tokenizer()), tmp_path, steps=8, data="chat", window=96)
    assert [text["name"] for text in found.record["deciding"]][:2] == ["conversations", "questions"]
    assert found.record["answers"] is None  # a random parent answers nothing


@pytest.mark.parametrize(("left", "taken"), [(20, True), (17, True), (15, False)])
def test_a_nearer_model_that_answers_fewer_questions_is_not_taken(left, taken, pair, tmp_path, monkeypatch):
    """The parent answers 20, the cut model too, and the recovered one `left` of them."""
    counts = iter([20, 20, left])

    def answered(_model, _tokenizer, questions, _progress):
        right = next(counts)
        return [number < right for number in range(len(questions))]

    monkeypatch.setattr(deciding, "rightly_answered", answered)
    monkeypatch.setattr(texts, "DECIDING_WINDOWS", 2)
    before = weights(pair.pruned)
    found = recovered(pair._replace(tokenizer=chat_tokenizer()), tmp_path, steps=8, window=96)
    assert all(text["after"] < text["before"] for text in found.record["deciding"])
    assert found.record["answers"] == {"asked": 20, "before": 20, "after": left}
    assert f"; answers 20 -> {left} of 20" in found.line
    assert (found.model is not None) is taken
    assert_same(pair.pruned, before)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"data": ["too short"]}, DataError, "are needed"),
        ({"data": "no such file.txt"}, DataError, "no such file.txt"),
    ],
)
def test_bad_text_is_refused(change, error, told, pair, tmp_path):
    with pytest.raises(error, match=told):
        recovered(pair, tmp_path, **change)


def test_another_vocabulary_is_refused(pair, tmp_path):
    with pytest.raises(UserError, match="vocabulary of 128 tokens and the parent one of 130"):
        recovered(pair._replace(parent=tiny_model("llama", vocab_size=130)), tmp_path)


def test_the_verdict():
    assert score([0.5, 0.2], [0.4, 0.2]) == pytest.approx(0.9)
    assert is_better([0.5, 0.2], [0.4, 0.2], 1)
    assert is_better([0.5, 0.2], [0.4, 0.205], 1)  # within what a text that is read can tell
    assert not is_better([0.5, 0.2], [0.4, 0.205], 2)  # the parent wrote it
    assert not is_better([0.5, 0.2], [0.1, 0.21], 1)  # better on average, and worse on a text
    assert not is_better([0.5], [float("nan")], 1)
    assert score([0.5], [float("nan")]) == float("inf")
    assert not is_better([0.5, 0.5], [0.5, 0.5], 1)


def test_the_curve_is_short():
    points = curve([float(step) for step in range(250)], 10)
    assert len(points) <= 100
    assert points[0] == [30, 1.0]
    assert points[-1] == [2500, 249.0]
