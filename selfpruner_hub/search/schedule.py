"""How a search spends its evaluations: what it asks for in which round, and what is scored on how much."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from selfpruner_hub.search.proposers import Operation


@dataclass(frozen=True)
class Schedule:
    """How a search spends its evaluations.

    Attributes:
        evaluations: Budget in full-evaluation equivalents (a score on half of the windows counts one half). A round
            that has begun within it is finished.
        population: Proposals of the operation `initial` in the first round; 0 starts from the seeds alone.
        crossover: Crossover children in a round.
        mutation: Mutation children in a round.
        first_share: Share of the windows on which every proposal is scored, in (0, 1].
        survivors: Share of a round's proposals that is scored on all windows, when `first_share` is less than 1.
        probe_share: Share of the windows on which small changes of the best plan are measured, in [0, 1]; 0: none.
        attempts: Times that a proposer is asked before a classical child takes the place of a bad reply.
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
        """Yield (round, operation, count) for ever; round 0 belongs to the seeds."""
        if self.population:
            yield 1, "initial", self.population
        number = 2
        while True:
            for operation, count in (("mutation", self.mutation), ("crossover", self.crossover)):
                if count:
                    yield number, operation, count  # type: ignore[misc]
                    number += 1
