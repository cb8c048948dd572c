"""The interface of a model in any runtime: settings for loading it, a timed pass, and its loss on text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

SPARE_CONTEXT = 8
"""Spare tokens of context beyond the longest sequence."""


@dataclass(frozen=True)
class Setting:
    """Settings for loading a model; a runtime ignores settings that it has no use for."""

    threads: int
    device: str
    dtype: str
    """Dtype of the weights, as the runtime names it; an existing export keeps its own."""
    longest: int
    """Length of the longest sequence that will be run, in tokens."""
    batch: int = 1
    """Largest batch size."""
    loading: dict[str, Any] = field(default_factory=dict)
    """Other keyword arguments of transformers' `from_pretrained`."""
    python: str = ""
    """Path of the Python that runs the runtime, if it is not this one."""
    staged: bool = False
    """Whether the model's directory was made by `OtherPython.staged`, so that code in it may run."""
    models: int = 1
    """Number of models that are loaded at a time, for a runtime that reserves memory of a GPU."""


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
