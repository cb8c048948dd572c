"""Latency of several models: interleaved passes after a warm-up, as median and spread; and their loss on text."""

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
    """Times of one pass: a prompt and the tokens after it."""

    prefill: float
    """Milliseconds until the first new token."""
    decode: float
    """Mean milliseconds for each further token."""


class Runner(Protocol):
    """A model that is loaded and can be timed."""

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Read prompts `[B, P]`, then generate greedy tokens one at a time; an end-of-text token does not stop it."""
        ...

    def cross_entropy(self, windows: Tensor) -> float:
        """Nats per predicted token of windows `[N, W]`, each predicted on its own from its second token on."""
        ...


class CausalLMRunner:
    """A model with the call interface of a transformers causal language model.

    Args:
        model: The model.
        device: Device of the model's inputs.
    """

    def __init__(self, model: Callable[..., Any], device: torch.device | str = "cpu") -> None:
        self.model = model
        self.device = torch.device(device)

    @torch.inference_mode()
    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `Runner.measure`."""
        ids = ids.to(self.device)
        start = self._now()
        out = self.model(input_ids=ids, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = self._now()
        for _ in range(new_tokens):
            out = self.model(input_ids=token, cache=out.cache, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1:].argmax(-1)
        return Measured(1000 * (read - start), 1000 * (self._now() - read) / new_tokens)

    @torch.inference_mode()
    def cross_entropy(self, windows: Tensor) -> float:
        """Measure the loss on text; see `Runner.cross_entropy`."""
        losses = []
        for window in windows.to(self.device):
            logits = self.model(input_ids=window[None], use_cache=True).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, window[1:].to(logits.device)).item())
        return statistics.fmean(losses)

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


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
        for runner, taken in zip(runners, passes, strict=True):
            runner.measure(ids, 1)
            measured = runner.measure(ids, new_tokens)
            progress()
            if run >= warmup:
                taken.append(measured)
    return passes
