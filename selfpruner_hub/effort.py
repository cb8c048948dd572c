"""How much work a run does: whether it searches, and how much text it reads in the minutes that a user has."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.forward import last_hidden_states
from selfpruner_hub.settings import SEARCH, PruneSettings
from selfpruner_hub.storage.checkpoints import Checkpoints

WINDOWS, WIDTH = 4, 512
"""Windows of the forward pass that is timed, and their tokens."""
PASSES = 12.0
"""Cost of a calibration token, in forward passes of the decoder over one token: writing it, calibration, both repairs,
and its share of the other texts. Fitted by hand to runs of 16 k tokens (`benchmarks/stages.json`) and 65 k."""
FIXED = 140_000.0
"""Cost of what does not depend on the text (order, factors, solutions), in the same unit."""
NO_SEARCH = "no search: the best starting point is taken (evaluations=N asks for one)"
SMALLEST, LARGEST = 4_096, 262_144
"""Fewest and most calibration tokens to choose from."""


def with_effort(
    method: PruneSettings,
    model: PreTrainedModel,
    checkpoints: Checkpoints,
    *,
    evaluations: float | None,
    proposer_given: bool,
    minutes: float | None,
) -> tuple[PruneSettings, list[str]]:
    """Decide what nobody has asked for: whether the run searches and how long, and how much text it reads.

    Args:
        method: Settings to start from.
        model: The dense model.
        checkpoints: Checkpoints of the run.
        evaluations: Length of the search that the user has asked for, which `method` has; or None.
        proposer_given: Whether the user has chosen a proposer, and so asked for a search.
        minutes: Minutes that the run may take; None leaves the text as it is. A search that was asked for comes on top.

    Returns:
        The settings, and lines for the user.

    Raises:
        UserError: The minutes are no number above 0, or too few.
    """
    lines = []
    if evaluations is None and proposer_given:
        method = replace(method, evaluations=method.evaluations or SEARCH)
    elif evaluations is None and minutes is not None:
        method = replace(method, evaluations=0)
    if evaluations is None and not method.evaluations:
        lines.append(NO_SEARCH)
    if minutes is not None:
        method, line = within_minutes(minutes, model, method, checkpoints)
        lines.append(line)
    return method, lines


def within_minutes(
    minutes: float, model: PreTrainedModel, method: PruneSettings, checkpoints: Checkpoints
) -> tuple[PruneSettings, str]:
    """Choose the amount of text so that a run without a search takes about this long.

    Quality grows with the number of calibration tokens (`benchmarks/scale.py`), and time in proportion to it. So the
    largest number that fits is taken, and the other texts shrink with it. The estimate is rough.

    Args:
        minutes: Minutes for the whole run, above 0.
        model: The dense model; a forward pass of it is timed.
        method: Settings to start from; the tokens of the three texts change.
        checkpoints: Checkpoints of the run, which keep the choice: a second timing might lead to another one.

    Returns:
        The settings, and a line that says what was chosen.

    Raises:
        UserError: `minutes` is no number above 0, or too short for the fewest tokens.
    """
    if isinstance(minutes, bool) or not isinstance(minutes, (int, float)) or not minutes > 0:
        raise UserError(f"minutes must be a number above 0; got {minutes!r}.")
    name = f"minutes-{minutes:g}"
    known = checkpoints.load(name) or _choice(minutes, model)
    checkpoints.save(name, known)
    tokens, expected = int(known["tokens"]), float(known["minutes"])
    few = max(SMALLEST // 2, tokens // 8)
    chosen = replace(
        method,
        calibration_tokens=tokens,
        fisher_tokens=min(method.fisher_tokens, few),
        fitness_tokens=min(method.fitness_tokens, 2 * few),
    )
    return chosen, f"about {expected:.1f} minutes: {tokens} tokens of calibration text"


def _choice(minutes: float, model: PreTrainedModel) -> dict[str, Tensor]:
    """The number of calibration tokens, and the minutes that they are expected to take."""
    per_pass = seconds_per_token(model) / 60
    tokens, expected = LARGEST, (FIXED + PASSES * LARGEST) * per_pass
    while expected > minutes and tokens > SMALLEST:
        tokens //= 2
        expected = (FIXED + PASSES * tokens) * per_pass
    if expected > minutes:
        raise UserError(
            f"Pruning this model on this device takes about {expected:.1f} minutes or more; {minutes:g} are too few.",
            "Give it more minutes, or a faster device.",
        )
    return {"tokens": torch.tensor(tokens), "minutes": torch.tensor(expected)}


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
