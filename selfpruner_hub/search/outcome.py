"""Where a search stands, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from selfpruner_hub.search.proposers import Scored


@dataclass(frozen=True)
class Standing:
    """Where a search stands."""

    round: int
    spent: float
    """Full-evaluation equivalents."""
    best: Scored | None
    """The best plan among those scored on all windows."""
    tokens: int
    """Tokens that a language model read and wrote."""


@dataclass
class Outcome:
    """What a search found."""

    best: Scored
    """The best plan among those scored on all windows."""
    best_seed: Scored
    """The best of those it started from."""
    spent: float
    """Full-evaluation equivalents."""
    counts: dict[str, int]
    """Proposals by origin and fate: accepted, refused, duplicate, replaced."""
    tokens: int
    """Tokens that a language model read and wrote."""
    elsewhere: tuple[float, float] | None = None
    """Fitness of the best seed and of the best plan on text that the search did not select on; None: not measured."""
    logit_scale: float = 1.0
    """By what the logits of the model that was made of the best plan were scaled (`confidence`)."""
