"""How much work a run does: a preset that fits into given minutes, recovery, and choices that a resumed run keeps."""

from functools import partial

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, pruner, ranks
from selfpruner_hub.errors import EndpointError, OutputError, SelfPrunerError, UserError
from selfpruner_hub.search import effort
from selfpruner_hub.search.effort import COSTS, CUT_SHARE, fitting_preset, minutes_left, with_effort
from selfpruner_hub.settings import PRESETS, SEARCH, PruneSettings, check_minutes, resolve
from selfpruner_hub.storage.checkpoints import Checkpoints, Clock

SECOND = 60.0 / (COSTS["default"].fixed + COSTS["default"].token * PRESETS["default"].calibration_tokens)
"""Seconds of a token's forward pass on a machine that takes a minute for the default."""


def minutes_of(preset, tokens=None):
    """Minutes that a preset takes on that machine."""
    cost = COSTS[preset]
    return (cost.fixed + cost.token * (tokens or PRESETS[preset].calibration_tokens)) * SECOND / 60


@pytest.fixture
def machine(monkeypatch):
    """Say how long the forward pass of a token takes here; tells how often it was timed."""
    timed = []

    def set_speed(seconds):
        monkeypatch.setattr(effort, "seconds_per_token", lambda _model: timed.append(seconds) or seconds)
        return timed

    return set_speed


def choose(minutes, recover=None, checkpoints=None, **changes):
    return fitting_preset(minutes, recover, None, partial(resolve, **changes), checkpoints or Checkpoints())


def test_the_default_leaves_a_part_for_recovery(machine):
    machine(SECOND)
    assert choose(1.01 / CUT_SHARE) == "default"
    assert choose(1000) == "default"  # recovery takes the rest
    assert choose(0.99 / CUT_SHARE) == choose(1.01 * minutes_of("draft")) == "draft"
    machine(SECOND / 4)  # a machine that is four times as fast
    assert choose(0.26 / CUT_SHARE) == "default"


def test_beside_a_given_recovery_the_default_may_take_all_that_is_left(machine):
    machine(SECOND)
    assert choose(1.01, recover=0) == choose(8.01, recover=7) == "default"
    assert choose(0.99, recover=0) == choose(7.99, recover=7) == "draft"


def test_text_that_the_user_has_set_is_counted(machine):
    machine(SECOND)
    assert minutes_of("default", 32_768) < 0.9 * CUT_SHARE
    assert choose(0.9, calibration_tokens=32_768) == "default"


def test_too_few_minutes_are_refused_with_what_it_takes(machine):
    machine(SECOND)
    least = f"takes about {minutes_of('draft'):.1f} minutes or more"
    with pytest.raises(UserError, match=f"{least}; 0.01 are too few"):
        choose(0.01)
    with pytest.raises(UserError, match=f"{least}; 0.01 are too few"):
        choose(7.01, recover=7)


@pytest.mark.parametrize("recover", [7, 8.5])
def test_recovery_cannot_take_all_minutes(recover):
    with pytest.raises(UserError, match=f"Of 7 minutes, {recover:g} for recovery leave none"):
        check_minutes(7, recover)


@pytest.mark.parametrize("value", [-1, True, "ten", float("nan"), float("inf")])
def test_minutes_are_numbers(value):
    for given, told in ((0, "minutes must be a number above 0"), (value, "minutes must be a number above 0")):
        with pytest.raises(UserError, match=told):
            check_minutes(given, None)
    with pytest.raises(UserError, match="recover must be a number of at least 0"):
        check_minutes(None, value)
    check_minutes(1, 0)


def test_a_resumed_run_keeps_its_choice(machine, tmp_path):
    timed = machine(SECOND)
    assert choose(2, checkpoints=Checkpoints(tmp_path)) == "default"
    machine(9 * SECOND)  # the machine is busy now
    assert choose(2, checkpoints=Checkpoints(tmp_path)) == "default"
    assert len(timed) == 1
    assert choose(2.5, checkpoints=Checkpoints(tmp_path)) == "draft"  # other minutes are another choice
    assert choose(2, 0.5, checkpoints=Checkpoints(tmp_path)) == "draft"


def test_recovery_gets_what_is_left(monkeypatch, tmp_path, caplog):
    now = [100.0]
    monkeypatch.setattr("selfpruner_hub.storage.checkpoints.time.monotonic", lambda: now[0])
    clock, kept = Clock(Checkpoints()), Checkpoints(tmp_path)
    now[0] += 240
    assert minutes_left(None, None, clock, Checkpoints()) is None
    assert minutes_left(None, 7.0, clock, Checkpoints()) == minutes_left(30.0, 7.0, clock, Checkpoints()) == 7.0
    assert minutes_left(30.0, 0, clock, Checkpoints()) is None
    assert minutes_left(10.0, None, clock, kept) == pytest.approx(6.0)
    assert minutes_left(3.0, None, clock, kept) is None
    assert "The cut took all of the 3 minutes" in caplog.text
    assert minutes_left(10.0, None, Clock(Checkpoints()), kept) == pytest.approx(6.0)  # resumed


def test_a_resumed_run_has_taken_the_time_of_its_stages_too(monkeypatch, tmp_path):
    """What was lost with a killed process does not count, and neither does the time between the two."""
    now = [100.0]
    monkeypatch.setattr("selfpruner_hub.storage.checkpoints.time.monotonic", lambda: now[0])
    known = Checkpoints(tmp_path).of("run")
    stages = Checkpoints(tmp_path).timed_by(Clock(known)).of("search")
    now[0] += 60
    stages.save("stage", {"a": torch.ones(1)})
    now[0] += 1000
    resumed = Clock(known)
    now[0] += 30
    assert resumed.elapsed == pytest.approx(90)
    assert minutes_left(10.0, None, resumed, stages) == pytest.approx(8.5)
    assert Clock(Checkpoints(tmp_path).of("other")).elapsed == 0


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
    ("paper", None, True, 1.0, 430, ["preset paper; recovery in what is left of the minutes"]),
    ("default", 7, False, 0.1, 7, ["preset default; "]),
    (None, None, False, 2.0, 0, ["preset default; ", "no search"]),
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
    assert "preset default; recovery in what is left of the minutes" in capsys.readouterr().err
    assert 0.5 < asked[0]["minutes"] < 1
    assert (asked[0]["data"], asked[0]["seed"]) == ("self", 3)
    assert torch.isfinite(made.model(torch.ones(1, 4, dtype=torch.long)).logits).all()
    pruned(monkeypatch, recover=7, progress=False)
    assert asked[1]["minutes"] == 7
    pruned(monkeypatch, minutes=1, recover=0, progress=False)
    pruned(monkeypatch, progress=False)
    assert len(asked) == 2


def test_a_model_in_files_is_not_recovered(machine, tmp_path, caplog, monkeypatch):
    machine(1e-9)
    for part in (tiny_model("llama"), tiny_tokenizer()):
        part.save_pretrained(tmp_path / "dense")
    dense = AutoPruner.from_pretrained(tmp_path / "dense", offload_folder=tmp_path / "scratch", device="cpu")
    with pytest.raises(UserError, match="this one rests in files. Leave out recover."):
        dense.prune(0.3, data="self", recover=7, progress=False)
    small = {"calibration_tokens": 512, "fitness_tokens": 128, "fisher_tokens": 128, "window": 32}
    dense.prune(0.3, data="self", recover=0, progress=False, **small)
    assert not caplog.text
    made = dense.prune(0.3, data="self", minutes=1, progress=False, **small)
    assert "The minutes are for the cut." in caplog.text
    assert made.report.recovery is None


def test_a_recovery_that_cannot_begin_loses_nothing(caplog, monkeypatch):
    made = pruned(monkeypatch, recover=1e-6, progress=False)
    assert made.report.recovery is None
    assert "The model was pruned, and not recovered. That is too little for a recovery." in caplog.text


@pytest.mark.parametrize(("error", "told"), [(MemoryError(), "Out of memory."), (EndpointError("Gone.", ""), "Gone.")])
def test_a_recovery_that_fails_loses_nothing(error, told, caplog, monkeypatch):
    raised = [RuntimeError("a defect"), error]

    def fail(*_args, **_given):
        raise raised.pop()

    monkeypatch.setattr(pruner.PrunedModel, "recover", fail)
    assert pruned(monkeypatch, recover=1, progress=False).report.recovery is None
    assert f"and not recovered. {told}" in caplog.text
    with pytest.raises(RuntimeError, match="a defect"):
        pruned(monkeypatch, recover=1, progress=False)


@pytest.mark.parametrize("error", [MemoryError(), SelfPrunerError("Another process has ended."), OutputError("Full.")])
def test_a_process_that_may_have_failed_alone_ends_for_the_others(error, monkeypatch):
    def fail(*_args, **_given):
        monkeypatch.setattr(ranks, "count", lambda: 2)
        raise error

    monkeypatch.setattr(pruner.PrunedModel, "recover", fail)
    with pytest.raises(type(error)):
        pruned(monkeypatch, recover=1, progress=False)


def test_a_recovery_after_the_papers_cut_reads_its_own_text(monkeypatch):
    asked = []
    monkeypatch.setattr(pruner.PrunedModel, "recover", lambda model, _parent, **given: asked.append(given) or model)
    small = {"calibration_tokens": 512, "fitness_tokens": 128, "fisher_tokens": 128, "window": 32, "evaluations": 0}
    monkeypatch.setattr(pruner, "PLAIN_DATA", "self")
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    dense.prune(0.3, preset="paper", recover=1, progress=False, **small)
    assert asked[0]["data"] is None
