"""Latency of two models side by side: interleaved, after a warm-up, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one thing that was timed."""

    median: float
    spread: float
    """Interquartile range."""
    runs: int


def interleaved(calls: Sequence[Callable[[], object]], *, runs: int = 7, warmup: int = 2) -> list[Timing]:
    """Time some calls in turn (A B A B …), so that a machine whose speed drifts treats them alike.

    Args:
        calls: What to time.
        runs: Counted runs of each, at least 2.
        warmup: Runs of each before counting.

    Returns:
        One timing per call.
    """
    for call in calls:
        for _ in range(warmup):
            call()
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1000 * (time.perf_counter() - start))
    return [_timing(taken) for taken in times]


def _timing(taken: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(taken, n=4)
    return Timing(round(middle, 3), round(high - low, 3), len(taken))


@torch.inference_mode()
def prefill_and_decode(
    models: Sequence[PreTrainedModel], prompt: Tensor, new_tokens: int = 16, runs: int = 7
) -> list[dict[str, Timing]]:
    """Time reading a prompt and writing tokens after it, for each model, interleaved.

    Args:
        models: Causal language models with one vocabulary.
        prompt: Token ids, `[B, P]`.
        new_tokens: Greedy tokens after the prompt, for the decode figure (per token).
        runs: Counted runs.

    Returns:
        Per model, `prefill` (ms per prompt batch) and `decode` (ms per step).
    """

    def read(model: PreTrainedModel) -> Callable[[], object]:
        return torch.inference_mode()(lambda: model(prompt.to(model.device), logits_to_keep=1, use_cache=True))

    def write(model: PreTrainedModel) -> Callable[[], object]:
        def steps() -> None:
            out = model(prompt[:, :1].to(model.device), logits_to_keep=1, use_cache=True)
            for _ in range(new_tokens):
                out = model(out.logits[:, -1:].argmax(-1), cache=out.cache, logits_to_keep=1, use_cache=True)

        return torch.inference_mode()(steps)

    prefill = interleaved([read(model) for model in models], runs=runs)
    decode = interleaved([write(model) for model in models], runs=runs)
    per_step = [Timing(d.median / new_tokens, d.spread / new_tokens, d.runs) for d in decode]
    return [{"prefill": p, "decode": d} for p, d in zip(prefill, per_step, strict=True)]
