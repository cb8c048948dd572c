"""How much a recovery writes and reads, and in which order."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from selfpruner_hub.errors import UserError
from selfpruner_hub.recovery.schedule import (
    FEWEST,
    FINAL,
    OVERHEAD,
    PLANNED,
    Schedule,
    Timed,
    keep,
    kept,
    planned,
    scheduled,
)
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.recovery.texts import Share, Text
from selfpruner_hub.storage.checkpoints import Checkpoints

KINDS = [Share("questions", "chat", 0.25), Share("text.txt", "text.txt", 0.75)]


def text(name, windows):
    return Text(name, torch.zeros(windows, 8, dtype=torch.long), torch.ones(windows, 7, dtype=torch.bool))


def test_tokens_are_read_in_shares():
    found = planned(RecoveryBudget(tokens=100_000), KINDS, 4, 512, resolve_recovery(), Timed({}, 0.0, 0.0))
    assert found == Schedule(48, [48, 144], None)


def test_the_time_pays_for_writing_and_training():
    timed = Timed({"questions": 2.0}, step=5.0, spent=30.0)
    found = planned(RecoveryBudget(minutes=10), KINDS, 4, 512, resolve_recovery(passes=2), timed)
    written = found.counts[0] / 2 * 2.0
    assert found.steps * OVERHEAD * 5.0 + written + 30 == pytest.approx(600, abs=7)
    assert found.seconds == pytest.approx(600 - 30 - written, abs=1)
    assert sum(found.counts) == 4 * found.steps


@pytest.mark.parametrize(
    ("budget", "told"), [(RecoveryBudget(minutes=0.6), "minutes=1.0"), (RecoveryBudget(tokens=4_000), "tokens=8192")]
)
def test_too_little_is_refused(budget, told):
    with pytest.raises(UserError, match=told):
        planned(budget, KINDS, 4, 512, resolve_recovery(), Timed({"questions": 2.0}, 5.0, 30.0))


@pytest.mark.parametrize("schedule", [Schedule(48, [48, 144], None), Schedule(3, [12], 12.5)])
def test_a_schedule_is_kept(schedule, tmp_path):
    checkpoints = Checkpoints(tmp_path, "run")
    assert kept(checkpoints, PLANNED) is None
    assert keep(checkpoints, PLANNED, schedule) == schedule
    assert kept(Checkpoints(tmp_path, "run"), PLANNED) == schedule
    assert kept(Checkpoints(tmp_path, "run"), FINAL) is None
    assert kept(Checkpoints(tmp_path, "other"), PLANNED) is None


def test_another_time_is_filled_with_more_steps_or_fewer():
    planned = Schedule(10, [10, 1, 29], 50.0)
    assert planned.within(76.0) == Schedule(15, [15, 2, 43], 76.0)
    assert planned.within(26.0) == Schedule(5, [5, 1, 14], 26.0)
    assert planned.within(-3.0) == Schedule(FEWEST, [4, 1, 11], 0.0)
    assert Schedule(10, [40], None).within(90.0) == Schedule(10, [40], None)


def test_text_whose_writing_was_not_timed_takes_the_longest():
    kinds = [*KINDS, Share("self", "self", 0.5)]
    timed = Timed({"questions": 2.0, "conversations": 3.0}, step=5.0, spent=30.0)
    found = planned(RecoveryBudget(minutes=10), kinds, 4, 512, resolve_recovery(passes=1), timed)
    assert found.steps == int(570 / (OVERHEAD * 5.0 + 4 * (0.25 * 2.0 + 0.5 * 3.0)))


def test_each_kind_of_text_is_read():
    kinds = [Share(f"{number}.txt", f"{number}.txt", 0.2) for number in range(5)]
    with pytest.raises(UserError, match="too little"):
        planned(RecoveryBudget(tokens=4 * 512), kinds, 1, 512, resolve_recovery(), Timed({}, 0.0, 0.0))
    found = planned(RecoveryBudget(tokens=5 * 512), kinds, 1, 512, resolve_recovery(), Timed({}, 0.0, 0.0))
    assert found.counts == [1] * 5


def test_texts_are_mixed_evenly_and_repeated_alike():
    texts, counts = [text("a", 10), text("b", 40)], [30, 90]
    order = scheduled(texts, counts, 0)
    assert Counter(number for number, _ in order) == {0: 30, 1: 90}
    for first in range(0, 120, 20):
        assert Counter(number for number, _ in order[first : first + 20])[0] in (4, 5, 6)
    assert set(Counter(window for number, window in order if number == 0).values()) == {3}
    assert order == scheduled(texts, counts, 0)
    assert order != scheduled(texts, counts, 1)


def test_a_short_recovery_is_measured_once():
    checks = [Schedule(steps, [], None).checks(4, 30, resolve_recovery()) for steps in (4, 60, 150, 250, 1000)]
    assert checks == [1, 1, 3, 5, 5]
    assert Schedule(4, [], None).checks(4, 30, resolve_recovery(checks=3)) == 3
