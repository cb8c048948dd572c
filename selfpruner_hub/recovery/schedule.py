"""Schedule of a recovery: how many windows it writes and reads in its time, and in which order."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.errors import UserError
from selfpruner_hub.recovery.divergence import distilled
from selfpruner_hub.recovery.settings import RecoveryBudget, RecoverySettings
from selfpruner_hub.recovery.texts import Share, Text
from selfpruner_hub.storage.checkpoints import Checkpoints

OVERHEAD = 1.15
"""Time of a step with its optimiser, checks and checkpoints, as a multiple of the passes that are timed."""
CHECKS, CHECKING = 5, 0.05
"""Most times that the model is measured on the deciding text, and the largest share of the time for it."""
FEWEST = 4
"""Fewest steps that a recovery is begun for."""
TRIALS = 3
"""Times that the passes of a step are timed."""
PLANNED, FINAL = "recovery-planned", "recovery-final"
"""Names of the checkpoints of the schedule before the texts are written, and after."""


class Timed(NamedTuple):
    """Measured times, in seconds."""

    writing: Mapping[str, float]
    """Writing a window of each kind that the parent writes."""
    step: float
    """The passes of a step."""
    spent: float
    """Time that is already spent."""


class Schedule(NamedTuple):
    """Windows that a recovery reads, and length of its training."""

    steps: int
    """Number of steps."""
    counts: list[int]
    """Windows that are read of each kind of text, with repeats."""
    seconds: float | None
    """Time of all steps; None sets no limit."""

    def checks(self, batch: int, deciding: int, settings: RecoverySettings) -> int:
        """Times that the model is measured: a forward pass of a window takes a third of its part of a step.

        Args:
            batch: Windows in a step.
            deciding: Windows of all deciding texts.
            settings: Settings of recovery, which may say it.

        Returns:
            At least 1.
        """
        affordable = int(CHECKING * self.steps * 3 * batch / deciding)
        return settings.checks or max(1, min(CHECKS, affordable))

    def within(self, seconds: float) -> Schedule:
        """Fit the steps to another time: more of them, which read windows of each kind once more, or fewer.

        Args:
            seconds: Time of all steps.

        Returns:
            The other schedule; this one where it has no limit.
        """
        if self.seconds is None:
            return self
        steps = max(FEWEST, int(self.steps * seconds / self.seconds))
        return Schedule(steps, shared(self.counts, sum(self.counts) // self.steps * steps), max(0.0, seconds))


def planned(
    budget: RecoveryBudget, kinds: Sequence[Share], batch: int, window: int, settings: RecoverySettings, timed: Timed
) -> Schedule:
    """Choose the number of steps, and of windows of each kind of text.

    Of the time that is left, what is written costs its share, and all windows cost their part of a step. The shares of
    the kinds are those of the windows.

    Args:
        budget: Minutes or tokens.
        kinds: Kinds of text with their shares.
        batch: Windows in a step.
        window: Tokens of a window.
        settings: Settings of recovery.
        timed: What was timed.

    Returns:
        The schedule.

    Raises:
        UserError: The budget is too small for a few steps.
    """
    if budget.minutes is None:
        steps, seconds = (budget.tokens or 0) // (batch * window), None
        needed = f"tokens={FEWEST * batch * window}"
    else:
        left = 60 * budget.minutes - timed.spent
        longest = max(timed.writing.values(), default=0.0)
        writing = sum(kind.share * timed.writing.get(kind.name, longest) for kind in kinds if kind.is_written)
        writing /= settings.passes
        each = OVERHEAD * timed.step + batch * writing
        steps = int(left / each)
        seconds = left - steps * batch * writing
        needed = f"minutes={math.ceil((timed.spent + FEWEST * each) / 6) / 10:.1f}"
    if steps < FEWEST or steps * batch < len(kinds):
        raise UserError("That is too little for a recovery.", f"Give it at least {needed} on this machine.")
    return Schedule(steps, shared([kind.share for kind in kinds], steps * batch), seconds)


def shared(weights: Sequence[float], windows: int) -> list[int]:
    """Share windows between kinds of text, at least one for each.

    Args:
        weights: Weight of each kind.
        windows: Number of windows.

    Returns:
        Number of windows of each kind.
    """
    counts = [max(1, round(weight / sum(weights) * windows)) for weight in weights]
    counts[counts.index(max(counts))] += windows - sum(counts)
    return counts


def kept(checkpoints: Checkpoints, name: str) -> Schedule | None:
    """Return a schedule that was kept, since a second timing might lead to another one.

    Args:
        checkpoints: Checkpoints of the recovery.
        name: Name of the schedule.

    Returns:
        The schedule; None if none was kept.
    """
    if (tensors := checkpoints.load(name)) is None:
        return None
    seconds = float(tensors["seconds"])
    return Schedule(int(tensors["steps"]), tensors["counts"].tolist(), seconds if seconds >= 0 else None)


def keep(checkpoints: Checkpoints, name: str, schedule: Schedule) -> Schedule:
    """Keep a schedule for a resumed recovery.

    Args:
        checkpoints: Checkpoints of the recovery.
        name: Name of the schedule.
        schedule: Schedule to keep.

    Returns:
        The schedule.
    """
    values = {"steps": schedule.steps, "seconds": -1.0 if schedule.seconds is None else schedule.seconds}
    tensors = {key: torch.tensor(value) for key, value in values.items()}
    checkpoints.save(name, {**tensors, "counts": torch.tensor(schedule.counts)})
    return schedule


def scheduled(texts: Sequence[Text], counts: Sequence[int], seed: int) -> list[tuple[int, int]]:
    """Order the windows of all texts: each text is read again and again, and all parts of the order are mixed alike.

    Args:
        texts: Texts.
        counts: Number of windows of each text to read.
        seed: Random seed.

    Returns:
        Pairs of the number of a text and the number of a window in it.
    """
    generator = torch.Generator().manual_seed(seed)
    placed: list[tuple[float, int, int]] = []
    for number, (text, count) in enumerate(zip(texts, counts, strict=True)):
        order: list[int] = []
        while len(order) < count:
            order += torch.randperm(len(text.windows), generator=generator).tolist()
        shift = torch.rand(1, generator=generator).item()
        placed += [((place + shift) / count, number, window) for place, window in enumerate(order[:count])]
    return [(number, window) for _, number, window in sorted(placed)]


def step_seconds(
    student: nn.Module, parent: PreTrainedModel, texts: Sequence[Text], batch: int, dtype: torch.dtype
) -> float:
    """Time the passes of a step, the fastest of a few: the first prepares kernels, others may be disturbed.

    No weight changes.

    Where FSDP will divide the weights, there may be no room for whole gradients: the backward pass counts as two
    forward passes.

    Args:
        student: The student, before training.
        parent: Its parent.
        texts: Texts to read.
        batch: Windows of a step that this process reads.
        dtype: Dtype of the products.

    Returns:
        Seconds of a step.
    """
    windows = torch.cat([text.windows for text in texts])[:batch].to(parent.device)
    counted = torch.cat([text.counted for text in texts])[:batch].to(parent.device)
    inputs = {"input_ids": windows, "counted": counted}
    seconds = []
    for _ in range(TRIALS):
        started = time.monotonic()
        with (
            torch.autocast(parent.device.type, dtype, enabled=dtype != torch.float32),
            torch.set_grad_enabled(not ranks.sharded()),
        ):
            loss = distilled(student, cast(PreTrainedModel, student), parent, inputs, dtype)
        if loss.requires_grad:
            loss.backward()
        loss.item()  # waits for an accelerator
        student.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - started)
    return min(seconds) * (3 if ranks.sharded() else 1) * batch / len(windows)
