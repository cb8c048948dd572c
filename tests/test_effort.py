"""How much work a run does: the text that fits into given minutes, and a choice that a resumed run keeps."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, effort, pruner
from selfpruner_hub.effort import COSTS, with_effort, within_minutes
from selfpruner_hub.errors import UserError
from selfpruner_hub.settings import PRESETS, SEARCH, TEXT_SIZES, check_minutes, resolve
from selfpruner_hub.storage.checkpoints import Checkpoints

DEFAULT = PRESETS["default"]
SECOND = 60.0 / (COSTS["default"].fixed + COSTS["default"].token * 65_536)
"""Seconds of a token's forward pass on a machine that takes a minute for the default's 65,536 calibration tokens."""


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


def choose(minutes, checkpoints=None, preset=None, **changes):
    return within_minutes(minutes, None, preset, partial(resolve, **changes), checkpoints or Checkpoints())


def test_the_most_text_that_fits_is_taken(machine):
    machine(SECOND)
    method, line = choose(1.001)
    assert method.calibration_tokens == 65_536
    assert line == "about 1.0 minutes: preset default, 65536 tokens of calibration text"
    assert choose(0.99)[0].calibration_tokens == 64_512
    assert choose(1000)[0].calibration_tokens == effort.LARGEST
    machine(SECOND / 4)  # a machine that is four times as fast
    assert choose(1.001)[0].calibration_tokens == effort.LARGEST


def test_the_other_texts_shrink_with_it_and_grow_no_further_than_the_preset(machine):
    machine(SECOND)
    little, much = choose(1.01 * least("default"))[0], choose(1000)[0]
    assert (little.calibration_tokens, little.fisher_tokens, little.fitness_tokens) == (16_384, 2_048, 4_096)
    assert (much.fisher_tokens, much.fitness_tokens) == (DEFAULT.fisher_tokens, DEFAULT.fitness_tokens)


def test_where_little_text_fits_a_faster_preset_is_taken(machine):
    machine(SECOND)
    for slower, faster in pairwise(COSTS):
        method, line = choose(0.999 * least(slower))
        assert f"preset {faster}, {method.calibration_tokens} tokens" in line
        assert method.importance == PRESETS[faster].importance
        assert method.sequential_repair == PRESETS[faster].sequential_repair
    assert choose(0.999 * least("default"), window=128)[0].window == 128  # what the user has changed stays


def test_a_preset_that_was_chosen_stays(machine):
    machine(SECOND)
    method, line = choose(1000, preset="draft")
    assert "preset draft, 262144 tokens" in line
    assert method.importance == PRESETS["draft"].importance
    for preset in ("best", "default"):
        with pytest.raises(UserError, match="are too few"):
            choose(least("draft"), preset=preset)


def test_too_few_minutes_are_refused_with_what_it_takes(machine):
    machine(SECOND)
    with pytest.raises(UserError, match=f"takes about {least('draft'):.1f} minutes or more; 0.01 are too few"):
        choose(0.01)


@pytest.mark.parametrize("minutes", [0, -1, True, "ten", float("nan")])
def test_minutes_are_a_number_above_zero(minutes):
    with pytest.raises(UserError, match="minutes must be a number above 0"):
        check_minutes(minutes, ())


@pytest.mark.parametrize("name", TEXT_SIZES)
def test_minutes_do_not_overrule_what_is_set(name):
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    with pytest.raises(UserError, match=f"minutes decides {name}, and both are given") as caught:
        dense.prune(0.3, data="self", minutes=1, progress=False, **{name: 128})
    assert caught.value.hint


def test_a_resumed_run_keeps_its_choice(machine, tmp_path):
    timed = machine(SECOND)
    first, _ = choose(1.0, Checkpoints(tmp_path))
    machine(9 * SECOND)  # the machine is busy now
    assert choose(1.0, Checkpoints(tmp_path))[0] == first
    assert len(timed) == 1
    assert choose(2.0, Checkpoints(tmp_path))[0] != first  # other minutes are another choice


def test_a_choice_is_of_its_preset(machine, tmp_path):
    machine(SECOND)
    minutes = 0.999 * least("default")
    for preset in (None, "fast"):  # where none is chosen it is fast too, at another place of its ladder
        assert "preset fast," in choose(minutes, Checkpoints(tmp_path), preset=preset)[1]


def test_the_forward_pass_of_the_model_is_timed():
    model = tiny_model("llama")
    calls = []
    handle = model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
    seconds = effort.seconds_per_token(model)
    handle.remove()
    assert len(calls) >= 2
    assert 0 < seconds < 1


@pytest.mark.parametrize(("preset", "evaluations", "proposer", "minutes", "length", "said"), [
    ("default", None, False, None, 0, ["no search"]),
    ("default", 7, False, None, 7, []),
    ("default", None, True, None, SEARCH, []),
    ("default", 0, True, None, 0, []),
    ("paper", None, False, None, 430, []),
    ("paper", None, True, None, 430, []),
    ("paper", None, False, 1.0, 0, ["about", "no search"]),
    ("paper", None, True, 1.0, 430, ["about"]),
    ("default", 7, False, 1.0, 7, ["about"]),
])  # fmt: skip
def test_a_run_searches_where_one_asks_for_it(machine, preset, evaluations, proposer, minutes, length, said):
    machine(SECOND)
    method, lines = with_effort(
        preset, partial(resolve, evaluations=evaluations), None, Checkpoints(),
        evaluations=evaluations, proposer_given=proposer, minutes=minutes,
    )  # fmt: skip
    assert method.evaluations == length
    assert [line[: len(start)] for line, start in zip(lines, said, strict=True)] == said


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


def test_prune_takes_minutes_and_says_what_it_picked(machine, monkeypatch, capsys):
    monkeypatch.setattr(effort, "LARGEST", 2_048)
    machine(1e-9)
    dense = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    made = dense.prune(0.3, data="self", minutes=1, window=32)
    assert made.report.method["calibration_tokens"] == made.report.data["calibration"]["tokens"] == 2_048
    assert made.report.method["fitness_tokens"] == 2_048
    assert "preset draft, 2048 tokens of calibration text" in capsys.readouterr().err
    assert torch.isfinite(made.model(torch.ones(1, 4, dtype=torch.long)).logits).all()
