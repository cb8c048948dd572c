"""The schedule of a search: the operation of each round, and its number of proposals."""

from __future__ import annotations

from collections.abc import Iterator

from selfpruner_hub.search.proposers import Operation
from selfpruner_hub.settings import SearchSchedule


def rounds(schedule: SearchSchedule) -> Iterator[tuple[int, Operation, int]]:
    """Yield (round, operation, number of proposals) without end; round 0 scores the seed plans.

    Args:
        schedule: Schedule of the search: `population`, `crossover` and `mutation`.

    Yields:
        Round 1 with the `initial` proposals, if there are any; then mutation and crossover in turn.
    """
    if schedule.population:
        yield 1, "initial", schedule.population
    number = 2
    while True:
        for operation, count in (("mutation", schedule.mutation), ("crossover", schedule.crossover)):
            if count:
                yield number, operation, count  # type: ignore[misc]
                number += 1
