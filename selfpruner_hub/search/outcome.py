"""State and result of a search."""

from __future__ import annotations

from dataclasses import dataclass

from selfpruner_hub.search.proposers import Scored

SEARCH_TEXT, UNSEEN_TEXT = "search_text", "unseen_text"
"""Texts on which a gain is measured: the fitness text, and one that neither calibration, nor repairs, nor search have
read."""


@dataclass(frozen=True)
class Standing:
    """State of a search after an evaluation."""

    round: int
    spent: float
    """Evaluations spent, in full-evaluation equivalents."""
    best: Scored | None
    """The best plan among those scored on all windows."""
    tokens: int
    """Number of tokens that a language model read and wrote."""


@dataclass(frozen=True)
class Outcome:
    """Result of a search."""

    best: Scored
    """The best plan among those scored on all windows."""
    best_seed: Scored
    """The best seed plan."""
    spent: float
    """Evaluations spent, in full-evaluation equivalents."""
    counts: dict[str, int]
    """Number of proposals that were accepted, refused, duplicate or replaced."""
    tokens: int
    """Number of tokens that a language model read and wrote."""


@dataclass(frozen=True)
class SearchResult:
    """Result of a search, and its gain on each text."""

    outcome: Outcome
    gains: dict[str, tuple[float, float]]
    """Fitness of the best seed plan and of the best plan, by text: `SEARCH_TEXT` and, where measured, `UNSEEN_TEXT`."""
    tokens: int
    """Number of tokens of the fitness text on which plans were scored."""
