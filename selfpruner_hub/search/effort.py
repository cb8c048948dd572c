"""Effort of a run: whether it searches, and how its minutes are shared between cut and recovery."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.forward import last_hidden_states
from selfpruner_hub.models.placement import streams
from selfpruner_hub.settings import SEARCH, PruneSettings
from selfpruner_hub.storage.checkpoints import Checkpoints, Clock

logger = logging.getLogger(__name__)
TIMED_WINDOWS, WIDTH = 4, 512
"""Windows of the forward pass that is timed, and their tokens."""
CUT_SHARE = 0.8
"""Largest share of the minutes that the default preset may take: with less for recovery, the quickest preset and a
longer recovery are better (`docs/results.md`, `front.py`)."""


class Cost(NamedTuple):
    """Time that a preset takes, in forward passes of the decoder over one token."""

    token: float
    """Cost of a calibration token: writing it, calibration, both repairs, and its share of the other texts."""
    fixed: float
    """Cost of what does not depend on the text: order, factors, solutions."""


COSTS = {"default": Cost(12.0, 140_000.0), "draft": Cost(11.0, 10_000.0)}
"""Presets to choose from, the better first. Fitted by hand to runs of 10 k to 74 k tokens on processors without AMX. It
need not be exact: what the cut takes less, recovery takes more."""
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
    """Decide what nobody has asked for: a preset that fits into the minutes, and whether the run searches.

    Args:
        preset: Name of the preset that the user has chosen, or None.
        resolved: Function that returns a preset's settings with the user's changes.
        model: The dense model.
        checkpoints: Checkpoints of the run.
        proposer_given: Whether the user has chosen a proposer, and so asked for a search.
        minutes: Minutes of the whole run; None takes the default preset. A search comes on top.
        recover: Minutes of recovery among them, or None.

    Returns:
        The settings, and lines for the user.

    Raises:
        UserError: The preset is unknown, or the minutes are too few.
    """
    lines = []
    if minutes is not None:
        preset = preset or fitting_preset(minutes, recover, model, resolved, checkpoints)
        rest = "; recovery in what is left of the minutes" if recover is None else ""
        lines.append(f"preset {preset}{rest}")
    settings = resolved(preset)
    if settings.schedule.evaluations is None:
        evaluations = SEARCH if proposer_given else 0
        settings = replace(settings, schedule=replace(settings.schedule, evaluations=evaluations))
        if not evaluations:
            lines.append(NO_SEARCH)
    return settings, lines


def fitting_preset(
    minutes: float,
    recover: float | None,
    model: PreTrainedModel,
    resolved: Callable[[str | None], PruneSettings],
    checkpoints: Checkpoints,
) -> str:
    """Choose the default preset if it fits into some minutes, by a rough estimate, else the draft.

    Args:
        minutes: Minutes of the whole run, above 0.
        recover: Minutes of recovery among them; None lets recovery take what the cut leaves.
        model: The dense model; a forward pass of it is timed.
        resolved: Function that returns a preset's settings with the user's changes.
        checkpoints: Checkpoints of the run, which keep the choice: a second timing might lead to another one.

    Returns:
        Name of the preset.

    Raises:
        UserError: The quickest one takes longer.
    """
    kept = f"preset-{minutes:g}-{recover}"
    if (tensors := checkpoints.load(kept)) is not None:
        return list(COSTS)[int(tensors["place"])]
    second = seconds_per_token(model)
    took = {
        name: (cost.fixed + cost.token * resolved(name).calibration_tokens) * second / 60
        for name, cost in COSTS.items()
    }
    most = CUT_SHARE * minutes if recover is None else minutes - recover
    preset = "default" if took["default"] <= most else "draft"
    if preset == "draft" and took[preset] > minutes - (recover or 0):
        raise UserError(
            f"Pruning this model on this device takes about {took[preset]:.1f} minutes or more; "
            f"{minutes - (recover or 0):g} are too few.",
            "Give it more minutes, or a faster device.",
        )
    checkpoints.save(kept, {"place": torch.tensor(list(COSTS).index(preset))})
    return preset


def recoverable(model: PreTrainedModel, minutes: float | None, recover: float | None) -> float | None:
    """Refuse the recovery of a model in files.

    Args:
        model: The dense model.
        minutes: Minutes that the user has given the whole run, or None.
        recover: Minutes that the user has given the recovery, or None.

    Returns:
        `recover`; 0 for a model in files.

    Raises:
        UserError: Recovery was asked for, and the model is in files.
    """
    if not streams(model):
        return recover
    reason = "Recovery needs both models in memory, and this one rests in files."
    remedy = "Recover the saved model on a machine that holds both."
    if recover:
        raise UserError(reason, f"Leave out recover. {remedy}")
    if minutes is not None and recover is None:
        logger.warning("%s The minutes are for the cut. %s", reason, remedy)
    return 0


def minutes_left(minutes: float | None, recover: float | None, clock: Clock, checkpoints: Checkpoints) -> float | None:
    """Return the minutes for recovery, once the model is cut.

    Args:
        minutes: Minutes that the user has given the whole run, or None.
        recover: Minutes that the user has given the recovery, or None.
        clock: Clock of the run.
        checkpoints: Checkpoints of the run, which keep the result: a resumed run has the same.

    Returns:
        Minutes, or None for no recovery.
    """
    if recover is not None or minutes is None:
        return recover or None
    name = f"recovery-minutes-{minutes:g}"
    if (tensors := checkpoints.load(name)) is None:
        tensors = {"minutes": torch.tensor(minutes - clock.elapsed / 60)}
        checkpoints.save(name, tensors)
    if (left := float(tensors["minutes"])) > 0:
        return left
    logger.warning("The cut took all of the %g minutes, so nothing was recovered.", minutes)
    return None


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
