"""Effort of a run: whether it searches, and how its minutes are shared between cut and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.forward import last_hidden_states
from selfpruner_hub.settings import SEARCH, PruneSettings
from selfpruner_hub.storage.checkpoints import Checkpoints

TIMED_WINDOWS, WIDTH = 4, 512
"""Windows of the forward pass that is timed, and their tokens."""
TOKEN_STEP = 1_024
"""Calibration tokens are chosen in multiples of this number."""


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
on a processor without AMX, that of `fast` guessed from a run with it. It need not be exact: what the cut takes less,
recovery takes more."""
NO_SEARCH = "no search: the best starting point is taken (evaluations=N asks for one)"


def with_effort(
    preset: str | None,
    resolved: Callable[[str | None], PruneSettings],
    model: PreTrainedModel,
    checkpoints: Checkpoints,
    *,
    proposer_given: bool,
    minutes: float | None,
    recover: float | None = None,
) -> tuple[PruneSettings, list[str]]:
    """Decide what nobody has asked for: preset and text that fit into the minutes, and whether the run searches.

    Args:
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        model: The dense model.
        checkpoints: Checkpoints of the run.
        proposer_given: Whether the user has chosen a proposer, and so asked for a search.
        minutes: Minutes of the whole run; None leaves the preset as it is. A search comes on top.
        recover: Minutes of recovery among them, or None.

    Returns:
        The settings, and lines for the user.

    Raises:
        UserError: The preset is unknown, or the minutes are too few.
    """
    settings, lines = resolved(preset), []
    if minutes is not None:
        settings, line = within_minutes(minutes, recover, model, preset, resolved, checkpoints)
        lines.append(line)
    if settings.schedule.evaluations is None:
        evaluations = SEARCH if proposer_given else 0
        settings = replace(settings, schedule=replace(settings.schedule, evaluations=evaluations))
        if not evaluations:
            lines.append(NO_SEARCH)
    return settings, lines


def within_minutes(
    minutes: float,
    recover: float | None,
    model: PreTrainedModel,
    preset: str | None,
    resolved: Callable[[str | None], PruneSettings],
    checkpoints: Checkpoints,
) -> tuple[PruneSettings, str]:
    """Choose a preset and the amount of text, up to its own, so that the cut takes no longer than this.

    The cut comes first, and recovery takes what is left. Where too little text fits for the default preset, a faster
    one is taken; one that the user has chosen stays.

    Args:
        minutes: Minutes of the whole run, above 0.
        recover: Minutes of recovery among them, which the cut may not take; None lets it take all.
        model: The dense model; a forward pass of it is timed.
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        checkpoints: Checkpoints of the run, which keep the choice: a second timing might lead to another one.

    Returns:
        The settings, and a line that says what was chosen.

    Raises:
        UserError: The minutes of the cut are too few for the fewest tokens.
    """
    left = minutes - (recover or 0)
    ladder = list(COSTS) if preset is None else [preset]
    name = f"minutes-{left:g}-{preset}"
    if (tensors := checkpoints.load(name)) is None:
        place, tokens = _choice(left, model, ladder)
        tensors = {"place": torch.tensor(place), "tokens": torch.tensor(tokens)}
        checkpoints.save(name, tensors)
    chosen = ladder[int(tensors["place"])]
    settings = resolved(chosen)
    tokens = min(settings.calibration_tokens, int(tensors["tokens"]))
    few = max(TOKEN_STEP, tokens // 8)
    settings = replace(
        settings,
        calibration_tokens=tokens,
        fisher_tokens=min(settings.fisher_tokens, few),
        fitness_tokens=min(settings.fitness_tokens, 2 * few),
    )
    rest = ", and recovery in what is left of the minutes" if recover is None else ""
    return settings, f"preset {chosen}, {tokens} tokens of calibration text{rest}"


def _choice(minutes: float, model: PreTrainedModel, ladder: Sequence[str]) -> tuple[int, int]:
    """The place of a preset in `ladder`, and the calibration tokens that fit."""
    per_pass = seconds_per_token(model) / 60
    for place, preset in enumerate(ladder):
        cost = COSTS.get(preset, COSTS["default"])
        tokens = int((minutes / per_pass - cost.fixed) / cost.token) // TOKEN_STEP * TOKEN_STEP
        if tokens >= cost.fewest:
            return place, tokens
    least = (cost.fixed + cost.token * cost.fewest) * per_pass
    raise UserError(
        f"Pruning this model on this device takes about {least:.1f} minutes or more; {minutes:g} are too few.",
        "Give it more minutes, or a faster device.",
    )


def minutes_left(
    minutes: float | None, recover: float | None, started: float, checkpoints: Checkpoints
) -> float | None:
    """Return the minutes for recovery, once the model is cut.

    Args:
        minutes: Minutes that the user has given the whole run, or None.
        recover: Minutes that the user has given the recovery, or None.
        started: Time at which the run began, of `time.monotonic`.
        checkpoints: Checkpoints of the run, which keep the result: a resumed run has the same.

    Returns:
        Minutes, or None for no recovery.
    """
    if recover is not None or minutes is None:
        return recover or None
    name = "recovery-minutes"
    if (tensors := checkpoints.load(name)) is None:
        tensors = {"minutes": torch.tensor(minutes - (time.monotonic() - started) / 60)}
        checkpoints.save(name, tensors)
    left = float(tensors["minutes"])
    return left if left > 0 else None


@torch.inference_mode()
def seconds_per_token(model: PreTrainedModel) -> float:
    """Time a forward pass of the decoder; the second of two, because the first prepares kernels.

    Args:
        model: The dense model.

    Returns:
        Seconds per token.
    """
    width = min(WIDTH, getattr(model.config, "max_position_embeddings", WIDTH))
    windows = torch.zeros(TIMED_WINDOWS, width, dtype=torch.long)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for hidden in last_hidden_states(model, windows):
            hidden.sum().item()  # waits for an accelerator
        seconds = time.perf_counter() - started
    return seconds / windows.numel()
