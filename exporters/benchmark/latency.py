"""Latency of several models: interleaved passes after a warm-up, as median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from exporters.runtime import Measured, Runner


@dataclass(frozen=True)
class Timing:
    """Median and spread of a quantity over several runs."""

    median: float
    spread: float
    """Interquartile range."""
    runs: int


def timing(values: Sequence[float]) -> Timing:
    """Summarise at least two values."""
    low, middle, high = statistics.quantiles(values, n=4)
    return Timing(round(middle, 4), round(high - low, 4), len(values))


def interleaved(
    runners: Sequence[Runner],
    ids: Tensor,
    new_tokens: int,
    *,
    runs: int = 7,
    warmup: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> list[list[Measured]]:
    """Run models in turn (A B A B …), so that a drift in the machine's speed affects all of them equally.

    Each turn begins with an uncounted pass, because the processor's caches still hold the other model.

    Args:
        runners: Models with the same vocabulary.
        ids: Token ids of the prompts, `[B, P]`.
        new_tokens: Number of tokens generated after each prompt, at least 1.
        runs: Number of counted passes of each model, at least 2.
        warmup: Number of uncounted turns of each model at the start.
        progress: Callback, called after every turn.

    Returns:
        For each model, its counted passes in order. Passes with the same index ran one after the other.
    """
    passes: list[list[Measured]] = [[] for _ in runners]
    for run in range(warmup + runs):
        for runner, times in zip(runners, passes, strict=True):
            runner.measure(ids, 1)
            measured = runner.measure(ids, new_tokens)
            progress()
            if run >= warmup:
                times.append(measured)
    return passes
