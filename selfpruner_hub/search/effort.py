"""How much work a run does: whether it searches, and how its minutes are shared between cut and recovery."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from selfpruner_hub.models.forward import last_hidden_states
from selfpruner_hub.settings import SEARCH, PruneSettings
from selfpruner_hub.storage.checkpoints import Checkpoints

WINDOWS, WIDTH = 4, 512
"""Windows of the forward pass that is timed, and their tokens."""
PASSES = {"default": 1_000_000, "fast": 200_000, "draft": 60_000}
"""Presets to choose from, the best first, and the time that they take, in forward passes of the decoder over one token
(`benchmarks/stages.json`). It is rough: what the cut takes more or less, recovery takes less or more."""
CUT = 0.8
"""Largest share of the minutes for the cut; recovery gets the rest. After 131 k tokens of recovery, the default cut is
nearer to its parent than that of `fast`, by more than recovery buys in the time between the two."""
NO_SEARCH = "no search: the best starting point is taken (evaluations=N asks for one)"


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
    """Decide what nobody has asked for: the preset that fits into the minutes, and whether the run searches.

    Args:
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        model: The dense model.
        checkpoints: Checkpoints of the run.
        evaluations: Length of the search that the user has asked for, which `resolved` gives; or None.
        proposer_given: Whether the user has chosen a proposer, and so asked for a search.
        minutes: Minutes that the cut may take; None leaves the preset as it is. A search comes on top.

    Returns:
        The settings, and lines for the user.

    Raises:
        UserError: The preset is unknown.
    """
    lines = []
    if minutes is not None and preset is None:
        preset = preset_within(minutes, model, checkpoints)
        lines.append(f"preset {preset}, which takes a part of the minutes")
    method = resolved(preset)
    if evaluations is None and proposer_given:
        method = replace(method, evaluations=method.evaluations or SEARCH)
    if evaluations is None and not method.evaluations:
        lines.append(NO_SEARCH)
    return method, lines


def preset_within(minutes: float, model: PreTrainedModel, checkpoints: Checkpoints) -> str:
    """Choose the best preset that takes no longer than this on this machine; the quickest one if none does.

    Args:
        minutes: Minutes for the cut, above 0.
        model: The dense model; a forward pass of it is timed.
        checkpoints: Checkpoints of the run, which keep the choice: a second timing might lead to another one.

    Returns:
        A key of `PASSES`.
    """
    ladder, name = list(PASSES), f"preset-{minutes:g}"
    if (known := checkpoints.load(name)) is None:
        affordable = 60 * minutes / seconds_per_token(model)
        fitting = [place for place, preset in enumerate(ladder) if PASSES[preset] <= affordable]
        known = {"place": torch.tensor(fitting[0] if fitting else len(ladder) - 1)}
        checkpoints.save(name, known)
    return ladder[int(known["place"])]


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
    if (known := checkpoints.load(name)) is None:
        known = {"minutes": torch.tensor(minutes - (time.monotonic() - started) / 60)}
        checkpoints.save(name, known)
    left = float(known["minutes"])
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
    windows = torch.zeros(WINDOWS, width, dtype=torch.long)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        for hidden in last_hidden_states(model, windows):
            hidden.sum().item()  # waits for an accelerator
        seconds = time.perf_counter() - started
    return seconds / windows.numel()
