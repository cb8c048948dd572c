"""Latency of models side by side: interleaved, after a warm-up, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """One pass over a prompt and the tokens after it."""

    prefill: float
    """Milliseconds from the prompt to its first new token."""
    decode: float
    """Milliseconds per further token, the mean of the pass."""


class Runner(Protocol):
    """A model that is loaded and can be timed."""

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Read prompts `[B, P]`, then write greedy tokens one at a time, past any end of text."""
        ...


class CausalLMRunner:
    """Anything that is called as a causal language model of transformers is.

    Args:
        model: The model.
        device: Where its inputs go.
    """

    def __init__(self, model: Callable[..., Any], device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)

    @torch.inference_mode()
    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; `Runner` says of what."""
        ids = ids.to(self.device)
        start = self._now()
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = self._now()
        for _ in range(new_tokens):
            out = self.model(input_ids=token, cache=out.cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return Measured(1000 * (read - start), 1000 * (self._now() - read) / new_tokens)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Timing:
    """A quantity over several runs."""

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
    """Run models in turn (A B A B …), so that a machine whose speed drifts treats them alike.

    A turn begins with a pass that does not count: until then, caches hold the other model.

    Args:
        runners: The models, of one vocabulary.
        ids: Prompts, `[B, P]`.
        new_tokens: Tokens after each, at least 1.
        runs: Counted passes of each model, at least 2.
        warmup: Passes of each before counting.
        progress: Called after every turn.

    Returns:
        Per model, its counted passes in order; the passes of one place were neighbours in time.
    """
    passes: list[list[Measured]] = [[] for _ in runners]
    for run in range(warmup + runs):
        for runner, taken in zip(runners, passes, strict=True):
            runner.measure(ids, 1)
            measured = runner.measure(ids, new_tokens)
            progress()
            if run >= warmup:
                taken.append(measured)
    return passes
