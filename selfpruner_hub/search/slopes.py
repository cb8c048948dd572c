"""The proposer that solves what it measures: moves along the predicted effects of small changes of the best plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.moves import moved, paying_moves
from selfpruner_hub.search.proposers import EvolutionProposer, Operation, Proposal, Scored

REACH = (0.25, 2.0)
"""Smallest and largest change of an FFN's rate, in steps of `predicted_loss.STEP`."""
LEAST_SHARE = 0.25
"""Smallest share of the paying moves that a proposal makes, best first."""


class SlopesProposer:
    """Solves a knapsack over small changes of the best plan, again and again: sequential linear programming.

    The effect of one step more or less of every part is measured at the best plan. Under these slopes, the best plan in
    a trust region makes the moves that pay (`moves.paying_moves`), each as far as the region allows. How far
    the slopes hold is not known, so each proposal draws the size of its region and the share of the moves that it
    makes; the scores decide. It is what a language model that proposes is told, and so its baseline.

    Args:
        budget: Parameter budget of the search.

    Raises:
        UserError: The units are experts, whose small changes have no gradient.
    """

    name = "slopes"
    reads_slopes = True

    def __init__(self, budget: Budget) -> None:
        if budget.shape.expert_weights:
            raise UserError(
                "slopes reads the effects of small changes, which are not measured for experts.", 'Use "evolution".'
            )
        self._budget = budget
        self._unmeasured = EvolutionProposer(budget)

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Move the measured plan; nothing is proposed if no move pays, and evolution proposes if nothing is measured.

        Args:
            operation: Kind of proposal; all are answered alike.
            history: Scored plans, best first; one of them holds `slopes`.
            count: Number of proposals.
            rng: Random generator.

        Returns:
            `count` changes of the measured plan, or none.
        """
        measured = next((index for index, scored in enumerate(history) if scored.slopes), None)
        if measured is None:
            return self._unmeasured.ask(operation, history, count, rng)
        slopes = history[measured].slopes
        moves = paying_moves(slopes, self._budget) if slopes else {}
        if not any(moves.values()):
            return []
        return [Proposal(self._drawn(history[measured].rates, moves, rng), (measured,)) for _ in range(count)]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history holds them."""

    def _drawn(self, rates: Rates, moves: dict[str, list[int]], rng: np.random.Generator) -> Rates:
        """Rates after the first moves of each list."""
        share, reach = rng.uniform(LEAST_SHARE, 1), math.exp(rng.uniform(*np.log(REACH)))
        return moved(rates, moves, self._budget, share, reach)
