"""An export that is opened for comparison: its files, their tokens, and their distance from the PyTorch model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import Step, greedy, kl_divergence, logit_difference


@dataclass(frozen=True)
class Expected:
    """The prompt, and what the PyTorch model says after it."""

    prompt: str
    ids: list[int]
    tokenizer: PreTrainedTokenizerBase
    new_tokens: int
    end: frozenset[int]
    """Tokens that end the text."""
    passes: list[Step]

    def of(self, model: Callable[..., Any]) -> Expected:
        """Return what another model says after the same prompt."""
        return replace(self, passes=continued(model, self.ids, self.new_tokens, self.end))


class Opened(Protocol):
    """A file of an export in its runtime."""

    @property
    def measured(self) -> str:
        """Quantity that is compared: `"logit"`, `"log-probability"` or `"KL divergence"`."""
        ...

    def tokens(self, expected: Expected) -> list[int]:
        """Greedy tokens after the prompt."""
        ...

    def difference(self, expected: Expected) -> float:
        """Largest distance from PyTorch; NaN if any is not finite."""
        ...


@dataclass(frozen=True)
class File:
    """A file of an export that can be compared."""

    name: str
    tolerance: float
    """Largest allowed distance from PyTorch."""
    open: Callable[[], Opened]
    """Function that opens it in its runtime."""
    reference: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    """Function that makes the PyTorch model which it is compared with; None compares with the model itself."""


@dataclass(frozen=True)
class Graph:
    """A model with the interface of a transformers model."""

    model: Callable[..., Any]
    rounded: bool = False
    """Whether its kernels round the inputs of matrices, so that single logits cannot be compared."""

    @property
    def measured(self) -> str:
        """Quantity that is compared."""
        return "KL divergence" if self.rounded else "logit"

    def tokens(self, expected: Expected) -> list[int]:
        """Greedy tokens after the prompt."""
        return chosen(expected.of(self.model).passes)

    def difference(self, expected: Expected) -> float:
        """Distance from PyTorch."""
        return (kl_divergence if self.rounded else logit_difference)(expected.passes, self.model)


def continued(model: Callable[..., Any], ids: list[int], new_tokens: int, end: frozenset[int]) -> list[Step]:
    """Let a model continue a prompt greedily.

    Args:
        model: Model with the interface of a transformers model.
        ids: Token ids of the prompt.
        new_tokens: Largest number of new tokens, at least 1.
        end: Tokens that end the text.

    Returns:
        Its forward passes, one for each new token.
    """
    prompt = torch.tensor([ids])
    return greedy(model, prompt, torch.ones_like(prompt), new_tokens - 1, end)


def chosen(passes: list[Step]) -> list[int]:
    """Return the greedy token of each pass."""
    return [int(step.next_tokens) for step in passes]
