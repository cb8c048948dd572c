"""Figures of a model on token windows: perplexity and divergence, without a tokens × vocabulary block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.models.forward import Loss, head_chunks, last_hidden_states

TOP_K = 64
"""Teacher probabilities kept per position; the rest of the mass is one more outcome."""


@dataclass(frozen=True)
class Teacher:
    """The most likely next tokens of the dense model at every predicted position.

    Attributes:
        ids: `[P, K]`, int32.
        log_probs: `[P, K]`, float32; natural logarithms.
    """

    ids: Tensor
    log_probs: Tensor


@torch.inference_mode()
def cross_entropy(model: PreTrainedModel, windows: Tensor) -> float:
    """Mean negative log-likelihood per predicted token, in nats; `N · (W - 1)` predictions.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`; each window is predicted on its own, from its second token on.

    Returns:
        Nats per token, at least 0.
    """
    return mean_losses(model, windows, label_loss(windows))[0]


def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Exp of `cross_entropy`."""
    return float(torch.tensor(cross_entropy(model, windows), dtype=torch.float64).exp())


@torch.inference_mode()
def teach(model: PreTrainedModel, windows: Tensor, top_k: int = TOP_K, counted: Tensor | None = None) -> Teacher:
    """Keep what `divergence` needs of the dense model; 8 · K bytes per predicted token.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`.
        top_k: Outcomes kept per position, at most the vocabulary.
        counted: Predictions that count, `[N, W - 1]`, bool; None counts all.

    Returns:
        The teacher, on the CPU.
    """
    ids, log_probs = [], []
    for _, logits in _logits(model, windows, counted):
        values, indices = logits.topk(min(top_k, logits.shape[1]), sorted=False)
        ids.append(indices.int().cpu())
        log_probs.append((values - logits.logsumexp(-1, keepdim=True)).cpu())
    return Teacher(torch.cat(ids), torch.cat(log_probs))


@torch.inference_mode()
def divergence(model: PreTrainedModel, windows: Tensor, teacher: Teacher) -> float:
    """Mean KL(teacher ‖ model) per predicted token, in nats, over the teacher's top outcomes and the rest as one.

    A lower bound of the full divergence, and 0 only for the teacher's own distribution on these outcomes.

    Args:
        model: A causal language model with the teacher's vocabulary.
        windows: Token ids, `[N, W]`: those that the teacher saw, or the first of them.
        teacher: What `teach` returned.

    Returns:
        Nats per token, at least 0 up to rounding.
    """
    return mean_losses(model, windows, teacher_loss(teacher))[0]


def label_loss(windows: Tensor, counted: Tensor | None = None) -> Loss:
    """The negative log-likelihood of the tokens that follow in `windows`, `[N, W]`, where they count."""
    targets = following(windows, counted)

    def loss(logits: Tensor, first: int) -> Tensor:
        wanted = targets[first : first + len(logits), None].to(logits.device)
        return (logits.logsumexp(-1) - logits.gather(1, wanted)[:, 0]).sum()

    return loss


def miss_loss(windows: Tensor, counted: Tensor | None = None) -> Loss:
    """The number of tokens that follow in `windows`, `[N, W]`, count, and are not the model's first choice."""
    targets = following(windows, counted)

    def loss(logits: Tensor, first: int) -> Tensor:
        return (logits.argmax(-1) != targets[first : first + len(logits)].to(logits.device)).sum()

    return loss


def following(windows: Tensor, counted: Tensor | None = None) -> Tensor:
    """The tokens that are predicted in `windows`, `[N, W]`, where they count, `[P]`."""
    return windows[:, 1:].flatten() if counted is None else windows[:, 1:][counted]


def teacher_loss(teacher: Teacher) -> Loss:
    """The divergence from a teacher, over its top outcomes and the rest as one."""

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
    """Several losses in one pass over the windows.

    Args:
        model: A causal language model.
        windows: Token ids, `[N, W]`.
        *losses: What to measure.
        counted: Predictions that count, `[N, W - 1]`, bool, as the losses know them; None counts all.

    Returns:
        The mean of each per predicted token, in nats.
    """
    totals, predicted = [0.0] * len(losses), 0
    for first, logits in _logits(model, windows, counted):
        totals = [total + loss(logits, first).item() for total, loss in zip(totals, losses, strict=True)]
        predicted += len(logits)
    return [total / predicted for total in totals]


def _logits(model: PreTrainedModel, windows: Tensor, counted: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first prediction, float32 logits `[≤ HEAD_TOKENS, V]`) over all windows."""
    done = 0
    for predicting in last_hidden_states(model, windows, counted):
        for first, logits in head_chunks(model, predicting):
            yield done + first, logits
        done += len(predicting)
