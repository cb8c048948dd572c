"""The schedule of a search: the operation of each round, and the share of the windows of each score."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selfpruner_hub.search.proposers import Operation


@dataclass(frozen=True)
class Schedule:
    """Schedule of a search.

    Attributes:
        evaluations: Length of the search in full-evaluation equivalents (a score on half of the windows counts one
            half). A round that has begun is finished.
        population: Number of `initial` proposals in the first round; 0 starts from the seed plans alone.
        crossover: Number of children in a crossover round.
        mutation: Number of children in a mutation round.
        first_share: Share of the windows on which every proposal is scored, in (0, 1].
        survivors: Share of a round's proposals that is scored on all windows, when `first_share` is less than 1.
        probe_share: Share of the windows on which small changes of the best plan are measured, in [0, 1]; 0 measures
            none.
        attempts: Number of times that a proposer is asked before evolution's children replace its bad replies.
    """

    evaluations: float
    population: int = 4
    crossover: int = 4
    mutation: int = 4
    first_share: float = 0.25
    survivors: float = 0.125
    probe_share: float = 0.25
    attempts: int = 2

    def rounds(self) -> Iterator[tuple[int, Operation, int]]:
        """Yield (round, operation, count) without end; round 0 scores the seed plans."""
        if self.population:
            yield 1, "initial", self.population
        number = 2
        while True:
            for operation, count in (("mutation", self.mutation), ("crossover", self.crossover)):
                if count:
                    yield number, operation, count  # type: ignore[misc]
                    number += 1
