"""How much work a run does: a preset that fits into given minutes, recovery, and choices that a resumed run keeps."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, pruner
from selfpruner_hub.errors import UserError
from selfpruner_hub.search import effort
from selfpruner_hub.search.effort import COSTS, minutes_left, with_effort, within_minutes
from selfpruner_hub.settings import PRESETS, SEARCH, TEXT_SIZES, PruneSettings, check_minutes, resolve
from selfpruner_hub.storage.checkpoints import Checkpoints

DEFAULT = PRESETS["default"]
SECOND = 60.0 / (COSTS["default"].fixed + COSTS["default"].token * DEFAULT.calibration_tokens)
"""Seconds of a token's forward pass on a machine that takes a minute for the default."""


def least(preset):
    """Minutes that a preset takes on that machine, with the fewest tokens that it is taken for."""
    cost = COSTS[preset]
    return (cost.fixed + cost.token * cost.fewest) * SECOND / 60


@pytest.fixture
def machine(monkeypatch):
    """Say how long the forward pass of a token takes here; tells how often it was timed."""
    timed = []

    def set_speed(seconds):
        monkeypatch.setattr(effort, "seconds_per_token", lambda _model: timed.append(seconds) or seconds)
        return timed

    return set_speed


def choose(minutes, checkpoints=None, preset=None, recover=None, **changes):
    return within_minutes(minutes, recover, None, preset, partial(resolve, **changes), checkpoints or Checkpoints())


def test_the_most_text_that_fits_is_taken_up_to_that_of_the_preset(machine):
    machine(SECOND)
    settings, line = choose(1.001)
    assert settings == DEFAULT
    assert line == "preset default, 73728 tokens of calibration text, and recovery in what is left of the minutes"
    assert choose(1000)[0] == DEFAULT  # recovery takes the rest
    assert choose(0.99)[0].calibration_tokens == 72_704
    machine(SECOND / 4)  # a machine that is four times as fast
    assert choose(0.251)[0] == DEFAULT


def test_the_minutes_of_recovery_are_not_for_the_cut(machine):
    machine(SECOND)
    assert choose(1.001, recover=0) == (DEFAULT, "preset default, 73728 tokens of calibration text")
    assert choose(8.001, recover=7)[0] == DEFAULT
    assert choose(7.99, recover=7)[0].calibration_tokens == 72_704
    for recover in (7, 8.5):
        with pytest.raises(UserError, match=f"Of 7 minutes, {recover:g} for recovery leave none"):
            check_minutes(7, recover, ())


def test_the_other_texts_shrink_with_it(machine):
    machine(SECOND)
    little = choose(1.01 * least("default"))[0]
    assert (little.calibration_tokens, little.fisher_tokens, little.fitness_tokens) == (16_384, 2_048, 4_096)


def test_where_little_text_fits_a_faster_preset_is_taken(machine):
    machine(SECOND)
    for slower, faster in pairwise(COSTS):
        settings, line = choose(0.999 * least(slower))
        assert line.startswith(f"preset {faster}, {settings.calibration_tokens} tokens")
        assert settings.importance == PRESETS[faster].importance
        assert settings.repair == PRESETS[faster].repair
    assert choose(0.999 * least("default"), window=128)[0].window == 128  # what the user has changed stays


def test_a_preset_that_was_chosen_stays(machine):
    machine(SECOND)
    settings, line = choose(1000, preset="draft")
    assert "preset draft, 4096 tokens" in line
    assert settings.importance == PRESETS["draft"].importance
    for preset in ("best", "default"):
        with pytest.raises(UserError, match="are too few"):
            choose(least("draft"), preset=preset)


def test_too_few_minutes_are_refused_with_what_it_takes(machine):
    machine(SECOND)
    with pytest.raises(UserError, match=f"takes about {least('draft'):.1f} minutes or more; 0.01 are too few"):
        choose(0.01)


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_minutes_do_not_overrule_what_is_set(name):
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    with pytest.raises(UserError, match=f"minutes decides {name}, and both are given") as caught:
        dense.prune(0.3, data="self", minutes=1, progress=False, **{name: 128})
    assert caught.value.hint


@pytest.mark.parametrize("value", [-1, True, "ten", float("nan")])
def test_minutes_are_numbers(value):
    for given, told in ((0, "minutes must be a number above 0"), (value, "minutes must be a number above 0")):
        with pytest.raises(UserError, match=told):
            check_minutes(given, None, ())
    with pytest.raises(UserError, match="recover must be a number of at least 0"):
        check_minutes(None, value, ())
    check_minutes(1, 0, ())


def test_a_resumed_run_keeps_its_choice(machine, tmp_path):
    timed = machine(SECOND)
    first, _ = choose(0.9, Checkpoints(tmp_path))
    machine(9 * SECOND)  # the machine is busy now
    assert choose(0.9, Checkpoints(tmp_path))[0] == first
    assert len(timed) == 1
    assert choose(0.95, Checkpoints(tmp_path))[0] != first  # other minutes are another choice


def test_a_choice_is_of_its_preset(machine, tmp_path):
    machine(SECOND)
    minutes = 0.999 * least("default")
    for preset in (None, "fast"):  # where none is chosen it is fast too, at another place of its ladder
        assert "preset fast," in choose(minutes, Checkpoints(tmp_path), preset=preset)[1]


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
    ("paper", None, True, 1.0, 430, ["preset paper, 32768"]),
    (None, None, False, 1.1, 0, ["preset default, 73728", "no search"]),
    (None, 7, False, 0.5, 7, ["preset default, "]),
])  # fmt: skip
def test_a_run_searches_where_one_asks_for_it(machine, preset, evaluations, proposer, minutes, length, said):
    machine(SECOND)
    settings, lines = with_effort(
        preset, partial(resolve, evaluations=evaluations), None, Checkpoints(),
        proposer_given=proposer, minutes=minutes,
    )  # fmt: skip
    assert settings.schedule.evaluations == length
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said
    assert settings.importance == PRESETS[preset or "default"].importance


@pytest.mark.parametrize(
    ("asked", "searches"), [({}, False), ({"proposer": "self"}, True), ({"proposer": "random"}, True)]
)
def test_a_proposer_that_is_named_searches(asked, searches, monkeypatch):
    seen = []
    monkeypatch.setattr(pruner, "choose_proposer", lambda *given: seen.append((given[0], given[4])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(0.3, progress=False, **asked)
    assert seen == [(asked.get("proposer"), searches)]


def pruned(monkeypatch, **asked):
    small = PruneSettings(calibration_tokens=512, fitness_tokens=128, fisher_tokens=128, window=32)
    monkeypatch.setitem(PRESETS, "default", small)
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    return dense.prune(0.3, data="self", **asked)


def test_prune_takes_minutes_and_recovers_in_them(machine, capsys, monkeypatch):
    machine(1e-9)
    asked = []

    def recover(model, parent, **given):
        asked.append(given)
        return model

    monkeypatch.setattr(pruner.PrunedModel, "recover", recover)
    made = pruned(monkeypatch, minutes=1, seed=3)
    assert "preset default, 512 tokens of calibration text, and recovery" in capsys.readouterr().err
    assert 0.5 < asked[0]["minutes"] < 1
    assert (asked[0]["data"], asked[0]["seed"]) == ("self", 3)
    assert torch.isfinite(made.model(torch.ones(1, 4, dtype=torch.long)).logits).all()
    pruned(monkeypatch, recover=7, progress=False)
    assert asked[1]["minutes"] == 7
    pruned(monkeypatch, minutes=1, recover=0, progress=False)
    pruned(monkeypatch, progress=False)
    assert len(asked) == 2


def test_a_recovery_that_cannot_begin_loses_nothing(caplog, monkeypatch):
    made = pruned(monkeypatch, recover=1e-6, progress=False)
    assert made.report.recovery is None
    assert "The model was pruned, and not recovered. That is too little for a recovery." in caplog.text
