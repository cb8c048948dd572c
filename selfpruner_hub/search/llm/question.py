"""One question to a language model: its operation, its budget, and the earlier solutions that its prompt shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.moves import paying_moves
from selfpruner_hub.search.proposers import Operation, Scored

SHOWN = 5
"""Number of earlier solutions in a prompt, ordered worst to best; each is numbered by its rank, so the best is 1."""
LISTED = 12
"""Maximum number of layers in a list of changes that lower the loss, and in the reply to it."""


@dataclass(frozen=True)
class Question:
    """Source of a prompt, of the schema of its reply, and of the reading of that reply."""

    operation: Operation
    """Kind of proposal."""
    history: Sequence[Scored]
    """Scored plans, best first; if empty, every operation asks for whole solutions."""
    budget: Budget
    """Budget, with β, the costs, the bounds of rates and the geometry of the model."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the lists of a solution."""
        return part_names(self.budget)

    @cached_property
    def shown(self) -> list[Scored]:
        """Solutions that the prompt shows, best first: the solution with number 1 is at index 0.

        The solution whose changes were measured is always among them; if necessary it replaces the worst one.
        """
        best = list(self.history[:SHOWN])
        measured = next((s for s in self.history if s.slopes), None)
        if measured is not None and measured not in best:
            best[-1] = measured
        return best

    @property
    def measured(self) -> int | None:
        """Number of the shown solution whose changes were measured; None where none was."""
        return next((number for number, s in enumerate(self.shown, 1) if s.slopes), None)

    @cached_property
    def promising(self) -> dict[tuple[str, str], list[int]]:
        """Layers (from 1) whose change lowers the loss, best first, by part and direction; empty if none does."""
        slopes = next((s.slopes for s in self.shown if s.slopes), None)
        if slopes is None:
            return {}
        moves = paying_moves(slopes, self.budget)
        layers = {
            (part, way): [layer + 1 for layer in moves[f"{'ffn' if part == 'rates' else part}_{direction}"]][:LISTED]
            for part in self.parts
            for way, direction in (("more", "removed"), ("less", "restored"))
        }
        return layers if any(layers.values()) else {}


def part_names(budget: Budget) -> tuple[str, ...]:
    """Return the names of the lists of a solution: one list where attention and FFN share their rates."""
    return ("rates",) if budget.tied else ("attention", "ffn")
