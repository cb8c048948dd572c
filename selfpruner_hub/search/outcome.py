"""Where a search stands, and what it found."""

from __future__ import annotations

from dataclasses import dataclass

from selfpruner_hub.search.proposers import Scored

SEARCH_TEXT, UNSEEN_TEXT = "search_text", "unseen_text"
"""Texts of a gain: that of the search, and one that neither calibration, nor repairs, nor search have seen."""


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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Found:
    """What a search found, and whether its gain holds."""

    outcome: Outcome
    gains: dict[str, tuple[float, float]]
    """By text, fitness of the best seed and of the best plan: on `SEARCH_TEXT` and, where measured, `UNSEEN_TEXT`."""
