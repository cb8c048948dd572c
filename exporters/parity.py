"""Comparison of an exported model's logits with the PyTorch model's."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.calibration.generated_text import sample_windows

PROMPT_LENGTHS = (24, 9, 1)
"""Lengths of the prompts of a parity check, in tokens; they form one left-padded batch."""
DECODE_STEPS = 4
"""Number of decode steps after the prompts."""
LARGE_LOGIT = 32.0
"""Logit above which differences count in proportion: it is rounded in larger steps (float16: 1/32 from 32 on)."""
LIKELY = 1 / 20
"""Least probability of a token that is compared where weights are rounded, relative to the likeliest token's."""


@dataclass(frozen=True)
class Step:
    """Inputs of one forward pass, and the logits of the model."""

    input_ids: Tensor
    """New tokens, `[B, S]`."""
    attention_mask: Tensor
    """Mask `[B, P + S]`: zeros on the left of the shorter prompts."""
    position_ids: Tensor
    """Positions of the new tokens, `[B, S]`."""
    logits: Tensor
    """Logits of the model, float32, `[B, S, V]`; of the last positions alone if it returns no others."""

    @property
    def next_tokens(self) -> Tensor:
        """Likeliest next token of each sequence, `[B, 1]`."""
        return self.logits[:, -1:].argmax(-1)


@torch.inference_mode()
def expected(
    model: PreTrainedModel,
    prompts: Collection[int] = PROMPT_LENGTHS,
    steps: int = DECODE_STEPS,
    text: Tensor | None = None,
) -> list[Step]:
    """Record the PyTorch model's logits on a left-padded batch of unequal prompts, then on decode steps.

    The record does not hold the model, so a later comparison needs no second model in memory.

    Args:
        model: The PyTorch model.
        prompts: Lengths of the batch's prompts, in tokens.
        steps: Number of greedy decode steps after them.
        text: Tokens of the prompts, `[B, S]`, of which each keeps its last ones; None draws them at random.

    Returns:
        The forward passes in order.
    """
    longest = max(prompts)
    if text is None:
        random = torch.Generator().manual_seed(0)
        text = torch.randint(model.config.vocab_size, (len(prompts), longest), generator=random)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in prompts]).long()
    return greedy(model, text, mask, steps)


def own_text(model: PreTrainedModel, prompts: Collection[int] = PROMPT_LENGTHS) -> Tensor:
    """Let the model write prompts: tokens `[B, S]`, for `expected`. A model is unsure of random tokens."""
    return sample_windows(model, len(prompts), max(prompts), seed=0)


@torch.inference_mode()
def greedy(
    model: Callable[..., Any], ids: Tensor, mask: Tensor, steps: int, end: Collection[int] = frozenset()
) -> list[Step]:
    """Record a model's logits on prompts, then on decode steps with its likeliest tokens.

    Args:
        model: PyTorch model, or an exported one; see `logit_difference`.
        ids: Tokens of the prompts, `[B, S]`.
        mask: Mask with ones for real tokens, `[B, S]`.
        steps: Largest number of decode steps.
        end: Tokens that end a sequence; there are no more steps once every sequence of the batch has one.

    Returns:
        The forward passes in order.
    """
    cache, passes = None, []
    ended = torch.zeros(len(ids), 1, dtype=torch.bool)
    for _ in range(steps + 1):
        positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
        cache = out.cache
        passes.append(Step(ids, mask, positions, out.logits.float().cpu()))
        ids = passes[-1].next_tokens
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        ended |= torch.isin(ids, torch.tensor(sorted(end)))
        if ended.all():
            break
    return passes


def likely(log_probabilities: Tensor) -> Tensor:
    """Tell the likely tokens of distributions, `[…, V]`: a mask of the same shape."""
    return log_probabilities >= log_probabilities.amax(-1, keepdim=True) + math.log(LIKELY)


def logit_difference(passes: Sequence[Step], exported: Callable[..., Any]) -> float:
    """Compare an exported model's logits with the PyTorch model's.

    Args:
        passes: Forward passes, from `expected`.
        exported: Exported model; takes `input_ids`, `attention_mask`, `position_ids`, `cache` and `use_cache`, and
            returns logits of all new tokens, or of the last ones alone.

    Returns:
        The largest absolute difference between logits of real tokens; NaN if any is NaN. At a token whose largest logit
        is above `LARGE_LOGIT`, differences shrink by the ratio of the two.
    """
    differences = [
        ((ours - theirs).abs() / (ours.abs().amax(-1, keepdim=True) / LARGE_LOGIT).clamp_min(1)).max()
        for ours, theirs in _beside(passes, exported)
    ]
    return torch.stack(differences).max().item()  # NaN stays


def kl_divergence(passes: Sequence[Step], exported: Callable[..., Any]) -> float:
    """Compare an exported model's probabilities with the PyTorch model's.

    Logits of single tokens tell little of weights in few bits: unlikely ones move far, and nobody samples them.

    Args:
        passes: Forward passes, from `expected`.
        exported: Exported model, as for `logit_difference`.

    Returns:
        The mean KL divergence from PyTorch over real tokens, in nats, at least 0; NaN if a probability is NaN.
    """
    divergences = []
    for ours, theirs in _beside(passes, exported):
        ours, theirs = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergences.append((ours.exp() * (ours - theirs)).sum(-1))
    return torch.cat(divergences).mean().clamp_min(0).item()


@torch.inference_mode()
def _beside(passes: Sequence[Step], exported: Callable[..., Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Run an exported model; yield the logits of real tokens of each pass, `[N, V]`: PyTorch's, and its own."""
    cache = None
    for step in passes:
        ids, mask = step.input_ids, step.attention_mask
        out = exported(input_ids=ids, attention_mask=mask, position_ids=step.position_ids, cache=cache, use_cache=True)
        cache = out.cache
        logits = out.logits.float().cpu()
        real = mask[:, -logits.shape[1] :].bool()
        yield step.logits[:, -logits.shape[1] :][real], logits[real]
