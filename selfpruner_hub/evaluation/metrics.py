"""Perplexity and KL divergence of a model on token windows, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.models.forward import Loss, head_chunks, last_hidden_states

TOP_K = 64
"""Number of teacher probabilities kept per position; the remaining probability mass is one more outcome."""


@dataclass(frozen=True)
class Teacher:
    """The most likely next tokens of the dense model at every predicted position.

    Attributes:
        ids: Token ids, `[P, K]`, int32.
        log_probs: Natural logarithms of their probabilities, `[P, K]`, float32.
    """

    ids: Tensor
    log_probs: Tensor


@torch.inference_mode()
def cross_entropy(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean negative log-likelihood per predicted token, in nats; `N · (W - 1)` predictions.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`; each window is predicted separately, from its second token on.

    Returns:
        Nats per token, at least 0.
    """
    return mean_losses(model, windows, label_loss(windows))[0]


def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """The exponential of `cross_entropy`."""
    return float(torch.tensor(cross_entropy(model, windows), dtype=torch.float64).exp())


@torch.inference_mode()
def teach(model: PreTrainedModel, windows: Tensor, top_k: int = TOP_K, counted: Tensor | None = None) -> Teacher:
    """Store the dense model's likeliest next tokens for `divergence`; 8 · K bytes per predicted token.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`.
        top_k: Number of tokens kept per position, at most the vocabulary.
        counted: Mask of the predictions that count, `[N, W - 1]`, bool; None counts all.

    Returns:
        The teacher, on the device of the model.
    """
    ids, log_probs = [], []
    for _, logits in _logits(model, windows, counted):
        values, indices = logits.topk(min(top_k, logits.shape[1]), sorted=False)
        ids.append(indices.int())
        log_probs.append(values - logits.logsumexp(-1, keepdim=True))
    return Teacher(torch.cat(ids), torch.cat(log_probs))


@torch.inference_mode()
def divergence(model: PreTrainedModel, windows: Tensor, teacher: Teacher) -> float:
    """Mean KL(teacher ‖ model) per predicted token, in nats, over the teacher's top tokens and the rest as one outcome.

    It is a lower bound of the full divergence, and 0 only if the two distributions agree on these outcomes.

    Args:
        model: A causal language model with the teacher's vocabulary.
        windows: Token ids, `[N, W]`: the windows of the teacher, or the first of them.
        teacher: Result of `teach`.

    Returns:
        Nats per token, at least 0 up to rounding.
    """
    return mean_losses(model, windows, teacher_loss(teacher))[0]


def label_loss(windows: Tensor, counted: Tensor | None = None) -> Loss:
    """The negative log-likelihood of the counted next tokens in `windows`, `[N, W]`."""
    targets = following(windows, counted)

    def loss(logits: Tensor, first: int) -> Tensor:
        labels = targets[first : first + len(logits), None].to(logits.device)
        return (logits.logsumexp(-1) - logits.gather(1, labels)[:, 0]).sum()

    return loss


def miss_loss(windows: Tensor, counted: Tensor | None = None) -> Loss:
    """The number of counted next tokens in `windows`, `[N, W]`, that are not the model's likeliest token."""
    targets = following(windows, counted)

    def loss(logits: Tensor, first: int) -> Tensor:
        return (logits.argmax(-1) != targets[first : first + len(logits)].to(logits.device)).sum()

    return loss


def following(windows: Tensor, counted: Tensor | None = None) -> Tensor:
    """The counted next tokens in `windows`, `[N, W]`, as one row, `[P]`."""
    return windows[:, 1:].flatten() if counted is None else windows[:, 1:][counted]


def teacher_loss(teacher: Teacher) -> Loss:
    """The KL divergence from a teacher, over its top tokens and all others as one outcome."""

    def loss(logits: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(logits))
        p = teacher.log_probs[rows].to(logits.device)
        q = logits.gather(1, teacher.ids[rows].long().to(logits.device)) - logits.logsumexp(-1, keepdim=True)
        inside = (p.exp() * (p - q)).sum(1)
        p_rest, q_rest = (1 - p.exp().sum(1)).clamp_min(1e-9), (1 - q.exp().sum(1)).clamp_min(1e-9)
        return (inside + p_rest * (p_rest.log() - q_rest.log())).sum()

    return loss


@torch.inference_mode()
def mean_losses(model: PreTrainedModel, windows: Tensor, *losses: Loss, counted: Tensor | None = None) -> list[float]:
    """Measure several losses in one pass over the windows.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`.
        *losses: Losses to measure.
        counted: Mask of the predictions that count, `[N, W - 1]`, bool; the losses must use the same. None counts all.

    Returns:
        Mean of each loss per predicted token, in its unit: nats, or the share of misses for `miss_loss`.
    """
    totals: list[list[Tensor]] = [[] for _ in losses]
    predicted = 0
    for first, logits in _logits(model, windows, counted):
        for sums, loss in zip(totals, losses, strict=True):
            sums.append(loss(logits, first))
        predicted += len(logits)
    return [sum(torch.stack(sums).tolist()) / predicted for sums in totals]  # they cross over from the device once


def _logits(model: PreTrainedModel, windows: Tensor, counted: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first prediction, float32 logits `[≤ HEAD_TOKENS, V]`) over all windows."""
    done = 0
    for predicting in last_hidden_states(model, windows, counted):
        for first, logits in head_chunks(model, predicting):
            yield done + first, logits
        done += len(predicting)
