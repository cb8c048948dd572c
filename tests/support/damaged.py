"""Damage of JSON: one value of a document is replaced or taken away, as a seed says."""

from __future__ import annotations

import copy
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from selfpruner_hub.errors import SelfPrunerError

WRONG: tuple[Any, ...] = (
    None, "x", "", -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**400, 2**62, True, [], {}, [1], {"a": 1}, "\ud800",
    "../../x", [[]], "1",
)  # fmt: skip


logger = logging.getLogger(__name__)
TIMES = 10 if os.environ.get("SELFPRUNER_THOROUGH") else 1
"""How many times as much is tried where that variable is set (docs/testing.md)."""


def damaged(value: Any, rng: random.Random) -> tuple[Any, list[Any]]:
    """A copy of a document with one wrong value, or without one of its keys; and the path of what was changed."""
    paths = list(_paths(value, []))
    path, made = rng.choice(paths), copy.deepcopy(value)
    owner = made
    for key in path[:-1]:
        owner = owner[key]
    if rng.random() < 0.2:
        del owner[path[-1]]
    else:
        owner[path[-1]] = copy.deepcopy(rng.choice(WRONG))
    return made, path


def _paths(value: Any, path: list[Any]) -> Iterator[list[Any]]:
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield [*path, key]
        yield from _paths(value[key], [*path, key])


def told_clearly(value: Any, act: Callable[[Any], object], count: int, seed: int = 0) -> Counter[str]:
    """Do something with `TIMES` as many damaged copies of a document; count what went well, and what was refused.

    Any other error, and one of several lines, is raised, with the path of the damage.
    """
    rng, found = random.Random(seed), Counter()
    for _ in range(TIMES * count):
        made, path = damaged(value, rng)
        try:
            act(made)
            found["fine"] += 1
        except Exception as error:
            if not isinstance(error, SelfPrunerError) or "\n" in str(error):
                error.add_note(f"damage at {path}")
                raise
            found["refused"] += 1
    logger.info("%d damaged copies: %s", TIMES * count, dict(found))
    return found
