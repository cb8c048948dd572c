"""How much work a run does: a preset that fits into given minutes, recovery, and choices that a resumed run keeps."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, pruner
from selfpruner_hub.errors import UserError
from selfpruner_hub.search import effort
from selfpruner_hub.search.effort import PASSES, minutes_left, preset_within, with_effort
from selfpruner_hub.settings import PRESETS, SEARCH, check_minutes, resolve
from selfpruner_hub.storage.checkpoints import Checkpoints

SECOND = 60.0 / PASSES["default"]
"""Seconds of a token's forward pass on a machine that takes a minute for the default."""


@pytest.fixture
def machine(monkeypatch):
    """Say how long the forward pass of a token takes here; tells how often it was timed."""
    timed = []

    def set_speed(seconds):
        monkeypatch.setattr(effort, "seconds_per_token", lambda _model: timed.append(seconds) or seconds)
        return timed

    return set_speed


def test_the_best_preset_that_fits_is_taken(machine):
    machine(SECOND)
    assert preset_within(1.001, None, Checkpoints()) == "default"
    for slower, faster in pairwise(PASSES):
        assert preset_within(0.999 * PASSES[slower] * SECOND / 60, None, Checkpoints()) == faster
    assert preset_within(0.001, None, Checkpoints()) == "draft"  # none fits
    machine(SECOND / 4)  # a machine that is four times as fast
    assert preset_within(0.26, None, Checkpoints()) == "default"


@pytest.mark.parametrize("value", [-1, True, "ten", float("nan")])
def test_minutes_are_numbers(value):
    for given, told in ((0, "minutes must be a number above 0"), (value, "minutes must be a number above 0")):
        with pytest.raises(UserError, match=told):
            check_minutes(given, None)
    with pytest.raises(UserError, match="recover must be a number of at least 0"):
        check_minutes(None, value)
    check_minutes(1, 0)


def test_a_resumed_run_keeps_its_choice(machine, tmp_path):
    timed = machine(SECOND)
    assert preset_within(1.1, None, Checkpoints(tmp_path)) == "default"
    machine(9 * SECOND)  # the machine is busy now
    assert preset_within(1.1, None, Checkpoints(tmp_path)) == "default"
    assert len(timed) == 1
    assert preset_within(1.2, None, Checkpoints(tmp_path)) == "draft"  # other minutes are another choice


def test_recovery_gets_what_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(effort.time, "monotonic", lambda: 100.0 + 240.0)
    assert minutes_left(None, None, 100.0, Checkpoints()) is None
    assert minutes_left(None, 7.0, 100.0, Checkpoints()) == minutes_left(30.0, 7.0, 100.0, Checkpoints()) == 7.0
    assert minutes_left(30.0, 0, 100.0, Checkpoints()) is None
    assert minutes_left(10.0, None, 100.0, Checkpoints(tmp_path)) == pytest.approx(6.0)
    assert minutes_left(3.0, None, 100.0, Checkpoints()) is None  # the cut took all of it
    monkeypatch.setattr(effort.time, "monotonic", lambda: 100.0)
    assert minutes_left(10.0, None, 100.0, Checkpoints(tmp_path)) == pytest.approx(6.0)  # resumed


def test_the_forward_pass_of_the_model_is_timed():
    model = tiny_model("llama")
    calls = []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    seconds = effort.seconds_per_token(model)
    handle.remove()
    assert len(calls) >= 2
    assert 0 < seconds < 1


@pytest.mark.parametrize(("preset", "evaluations", "proposer", "minutes", "length", "said"), [
    (None, None, False, None, 0, ["no search"]),
    (None, 7, False, None, 7, []),
    (None, None, True, None, SEARCH, []),
    (None, 0, True, None, 0, []),
    ("paper", None, False, None, 430, []),
    ("paper", None, True, 1.0, 430, []),
    (None, None, False, 1.1, 0, ["preset default, which", "no search"]),
    (None, 7, False, 0.5, 7, ["preset fast, which"]),
])  # fmt: skip
def test_a_run_searches_where_one_asks_for_it(machine, preset, evaluations, proposer, minutes, length, said):
    machine(SECOND)
    method, lines = with_effort(
        preset, partial(resolve, evaluations=evaluations), None, Checkpoints(),
        evaluations=evaluations, proposer_given=proposer, minutes=minutes,
    )  # fmt: skip
    assert method.evaluations == length
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said
    assert method.importance == PRESETS[preset or "default"].importance


@pytest.mark.parametrize(
    ("asked", "length"), [({}, 0), ({"proposer": "self"}, SEARCH), ({"proposer": "random"}, SEARCH)]
)
def test_a_proposer_that_is_named_searches(asked, length, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pruner, "choose_proposer", lambda *given: seen.append((given[0], given[3].evaluations)) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(0.3, progress=False, **asked)
    assert seen == [(asked.get("proposer"), length)]


def pruned(**asked):
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    small = {"calibration_tokens": 512, "fitness_tokens": 128, "fisher_tokens": 128, "window": 32}
    return dense.prune(0.3, data="self", **small, **asked)


def test_prune_takes_minutes_and_recovers_in_them(machine, capsys, monkeypatch):
    machine(1e-9)
    asked = []

    def recover(model, parent, **given):
        asked.append(given)
        return model

    monkeypatch.setattr(pruner.PrunedModel, "recover", recover)
    made = pruned(minutes=1, seed=3)
    assert "preset default, which takes a part of the minutes" in capsys.readouterr().err
    assert 0.5 < asked[0]["minutes"] < 1
    assert (asked[0]["data"], asked[0]["seed"]) == ("self", 3)
    assert torch.isfinite(made.model(torch.ones(1, 4, dtype=torch.long)).logits).all()
    pruned(recover=7, progress=False)
    assert asked[1]["minutes"] == 7
    pruned(minutes=1, recover=0, progress=False)
    pruned(progress=False)
    assert len(asked) == 2


def test_a_recovery_that_cannot_begin_loses_nothing(caplog):
    made = pruned(recover=1e-6, progress=False)
    assert made.report.recovery is None
    assert "The model was pruned, and not recovered. That is too little for a recovery." in caplog.text
