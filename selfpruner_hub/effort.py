"""How much work a run does: whether it searches, and how much text it reads in the minutes that a user has."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.forward import last_hidden_states
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.settings import SEARCH, PruneSettings
from selfpruner_hub.storage.checkpoints import Checkpoints

WINDOWS, WIDTH = 4, 512
"""Windows of the forward pass that is timed, and their tokens."""


class Cost(NamedTuple):
    """Time that a preset takes, in forward passes of the decoder over one token."""

    token: float
    """Cost of a calibration token: writing it, calibration, both repairs, and its share of the other texts."""
    fixed: float
    """Cost of what does not depend on the text: order, factors, solutions."""
    fewest: int
    """Fewest calibration tokens that the preset is taken for; with fewer, the next one is better."""


COSTS = {
    "default": Cost(12.0, 140_000.0, 16_384),
    "fast": Cost(12.0, 70_000.0, 8_192),
    "draft": Cost(11.0, 10_000.0, 2_048),
}
"""Presets to choose from, the best first. Fitted by hand to runs of 16 k tokens (`benchmarks/stages.json`) and 65 k
on a processor without AMX, that of `fast` guessed from a run with it. The forward pass gains more from AMX than the
rest: with it, a run takes a third longer than is said here."""
NO_SEARCH = "no search: the best starting point is taken (evaluations=N asks for one)"
STEP, LARGEST = 1_024, 262_144
"""Calibration tokens are chosen in multiples of `STEP`, up to `LARGEST`."""


def with_effort(
    preset: str | None,
    resolved: Callable[[str | None], PruneSettings],
    model: PreTrainedModel,
    checkpoints: Checkpoints,
    *,
    evaluations: float | None,
    proposer_given: bool,
    minutes: float | None,
) -> tuple[PruneSettings, list[str]]:
    """Decide what nobody has asked for: whether the run searches and how long, and how much text it reads.

    Args:
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        model: The dense model.
        checkpoints: Checkpoints of the run.
        evaluations: Length of the search that the user has asked for, which `resolved` gives; or None.
        proposer_given: Whether the user has chosen a proposer, and so asked for a search.
        minutes: Minutes that the run may take; None leaves the text as it is. A search that was asked for comes on top.

    Returns:
        The settings, and lines for the user.

    Raises:
        UserError: The preset is unknown, or the minutes are too few.
    """
    method, lines = resolved(preset), []
    if minutes is not None:
        method, line = within_minutes(minutes, model, preset, resolved, checkpoints)
        lines.append(line)
    if evaluations is None and proposer_given:
        method = replace(method, evaluations=method.evaluations or SEARCH)
    elif evaluations is None and minutes is not None:
        method = replace(method, evaluations=0)
    if evaluations is None and not method.evaluations:
        lines.append(NO_SEARCH)
    return method, lines


def within_minutes(
    minutes: float,
    model: PreTrainedModel,
    preset: str | None,
    resolved: Callable[[str | None], PruneSettings],
    checkpoints: Checkpoints,
) -> tuple[PruneSettings, str]:
    """Choose a preset and the amount of text so that a run without a search takes about this long.

    Quality grows with the number of calibration tokens (`benchmarks/scale.py`), and time in proportion to it. So the
    largest number that fits is taken, and the other texts shrink with it. Where that is too little text for the default
    preset, a faster one is taken; a preset that the user has chosen stays, the default too. The estimate is rough.

    Args:
        minutes: Minutes for the whole run, above 0.
        model: The dense model; a forward pass of it is timed.
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        checkpoints: Checkpoints of the run, which keep the choice: a second timing might lead to another one.

    Returns:
        The settings, and a line that says what was chosen.

    Raises:
        UserError: `minutes` is too short for the fewest tokens.
    """
    ladder = list(COSTS) if preset is None else [preset]
    name = f"minutes-{minutes:g}-{preset}"
    known = checkpoints.load(name) or _choice(minutes, model, ladder)
    checkpoints.save(name, known)
    chosen, tokens, expected = ladder[int(known["preset"])], int(known["tokens"]), float(known["minutes"])
    method, few = resolved(chosen), max(STEP, tokens // 8)
    method = replace(
        method,
        calibration_tokens=tokens,
        fisher_tokens=min(method.fisher_tokens, few),
        fitness_tokens=min(method.fitness_tokens, 2 * few),
    )
    return method, f"about {expected:.1f} minutes: preset {chosen}, {tokens} tokens of calibration text"


def _choice(minutes: float, model: PreTrainedModel, ladder: Sequence[str]) -> dict[str, Tensor]:
    """The place of a preset in `ladder`, the calibration tokens, and the minutes that they are expected to take."""
    with working_on(model):
        per_pass = seconds_per_token(model) / 60
    for place, preset in enumerate(ladder):
        cost = COSTS.get(preset, COSTS["default"])
        tokens = min(LARGEST, int((minutes / per_pass - cost.fixed) / cost.token) // STEP * STEP)
        if tokens >= cost.fewest:
            expected = (cost.fixed + cost.token * tokens) * per_pass
            known = {"preset": place, "tokens": tokens, "minutes": expected}
            return {key: torch.tensor(value) for key, value in known.items()}
    least = (cost.fixed + cost.token * cost.fewest) * per_pass
    raise UserError(
        f"Pruning this model on this device takes about {least:.1f} minutes or more; {minutes:g} are too few.",
        "Give it more minutes, or a faster device.",
    )


@torch.inference_mode()
def seconds_per_token(model: PreTrainedModel) -> float:
    """Time a forward pass of the decoder; the second of two, because the first prepares kernels.

    Args:
        model: The dense model.

    Returns:
        Seconds per token.
    """
    width = min(WIDTH, getattr(model.config, "max_position_embeddings", WIDTH))
    windows = torch.zeros(WINDOWS, width, dtype=torch.long)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for hidden in last_hidden_states(model, windows):
            hidden.sum().item()  # waits for an accelerator
        seconds = time.perf_counter() - started
    return seconds / windows.numel()
