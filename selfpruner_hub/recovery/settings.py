"""Settings of recovery, and its budget."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from selfpruner_hub.errors import UserError
from selfpruner_hub.settings.fields import Rules, with_changes

REFERENCE_RATE, REFERENCE_SIZE = 2e-4, 1.35e8
"""Learning rate that was measured, and the number of parameters of the model that it was measured on."""
LORA_FACTOR = 10.0
"""Learning rate of adapters, as a multiple of that of full weights (docs/recovery.md)."""


@dataclass(frozen=True)
class RecoverySettings:
    """Every setting of `recover` that changes its result; all of them go into the record."""

    method: str = "auto"
    """full (all weights), lora (adapters on all linear layers, merged at the end), or auto: full where float32 weights,
    gradients and optimiser fit into memory."""
    rank: int = 32
    """Rank of the adapters of lora."""
    learning_rate: float = 0.0
    """Peak learning rate of AdamW. 0 takes 2e-4 for models up to 135 M parameters and less for larger ones, in
    proportion to the square root of their size; ten times that for lora."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    warmup: int = 10
    """Steps of linear warm-up; from there the rate falls linearly to 0."""
    batch_tokens: int = 2_048
    """Tokens of a step, rounded to whole windows."""
    window: int = 256
    """Tokens of a window. Longer ones cost more time, and brought no more."""
    written_share: float = 0.6
    """Share of the windows that the parent writes, where text that it writes and text that is read are combined."""
    question_share: float = 0.5
    """Share of short questions among the windows that a chat model writes; the others are longer conversations."""
    passes: int = 2
    """Times that written text is read."""
    checks: int = 0
    """Times that the model is measured on the deciding text; the best state is kept. 0 takes up to 5, as many as take a
    twentieth of the time."""

    def record(self) -> dict[str, Any]:
        """All settings, JSON-serialisable."""
        return asdict(self)

    def rate(self, parameters: int, lora: bool) -> float:
        """Peak learning rate.

        Args:
            parameters: Number of parameters of the pruned model.
            lora: Whether adapters are trained.

        Returns:
            Learning rate, above 0.
        """
        if self.learning_rate:
            return self.learning_rate
        full = REFERENCE_RATE * min(1.0, math.sqrt(REFERENCE_SIZE / parameters))
        return full * (LORA_FACTOR if lora else 1.0)


@dataclass(frozen=True)
class RecoveryBudget:
    """Length of a recovery, in minutes or in tokens: one of the two is given."""

    minutes: float | None = None
    """Minutes in all, with writing the text and measuring."""
    tokens: int | None = None
    """Tokens that are trained on, with repeats."""

    def __post_init__(self) -> None:
        """Check that exactly one of the two is given, and is a positive number."""
        if (self.minutes is None) == (self.tokens is None):
            raise UserError("Recovery needs either minutes or tokens.", "For example minutes=30 (--minutes 30).")
        name, kinds = ("tokens", (int,)) if self.minutes is None else ("minutes", (int, float))
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 1e12:
            raise UserError(f"{name} of recovery must be a number above 0; got {value!r}.")


_RECOVERY_RULES = Rules(
    ranges={
        "rank": (1, 4096),
        "learning_rate": (0, 1e3),
        "beta2": (0, 0.9999),
        "warmup": (0, 1 << 20),
        "batch_tokens": (1, 1 << 30),
        "window": (8, 1 << 20),
        "written_share": (0, 1),
        "question_share": (0, 1),
        "passes": (1, 1 << 20),
        "checks": (0, 1 << 20),
    },
    choices={"method": ("auto", "full", "lora")},
    what="recovery setting",
)


def resolve_recovery(**changes: Any) -> RecoverySettings:
    """Take the default settings and change some of them.

    Args:
        **changes: Fields of `RecoverySettings`.

    Returns:
        The checked settings.

    Raises:
        UserError: A setting is unknown, or a value is out of its range.
    """
    return with_changes(RecoverySettings(), changes, _RECOVERY_RULES)
