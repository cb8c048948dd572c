"""Comparison of an exported model's logits with those of the PyTorch model."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PROMPTS = (24, 9, 1)
"""Lengths of the prompts of a parity check, in tokens; they form one left-padded batch."""
STEPS = 4
"""Number of decode steps after the prompts."""
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
def expected(model: PreTrainedModel, prompts: Collection[int] = PROMPTS, steps: int = STEPS) -> list[Step]:
    """Record the PyTorch model's logits on a left-padded batch of unequal prompts, then on decode steps.

    The record does not hold the model, so a later comparison needs no second model in memory.

    Args:
        model: The PyTorch model.
        prompts: Lengths of the batch's prompts, in tokens.
        steps: Number of greedy decode steps after them.

    Returns:
        The forward passes in order.
    """
    longest = max(prompts)
    ids = torch.randint(model.config.vocab_size, (len(prompts), longest), generator=torch.Generator().manual_seed(0))
    mask = torch.stack([torch.arange(longest) >= longest - length for length in prompts]).long()
    return greedy(model, ids, mask, steps)


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


@torch.inference_mode()
def logit_difference(passes: Sequence[Step], exported: Callable[..., Any], rounded: bool = False) -> float:
    """Compare an exported model's logits with those of the PyTorch model.

    Weights in few bits move unlikely tokens far, by 1.2 in 8 bits of a pruned SmolLM2, and that adds almost nothing to
    the KL divergence. For them, log-probabilities of likely tokens are compared.

    Args:
        passes: Forward passes, from `expected`.
        exported: Exported model; takes `input_ids`, `attention_mask`, `position_ids`, `cache` and `use_cache`, and
            returns logits of all new tokens, or of the last ones alone.
        rounded: Flag of weights in few bits: compares log-probabilities of the tokens that are likely in PyTorch.

    Returns:
        The largest absolute difference between logits of real tokens; NaN if any is NaN.
    """
    cache, worst = None, 0.0
    for step in passes:
        ids, mask = step.input_ids, step.attention_mask
        out = exported(input_ids=ids, attention_mask=mask, position_ids=step.position_ids, cache=cache, use_cache=True)
        cache = out.cache
        found = out.logits.float().cpu()
        real = mask[:, -found.shape[1] :].bool()
        ours, theirs = step.logits[:, -found.shape[1] :][real], found[real]
        if rounded:
            ours, theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
            kept = likely(ours)
            ours, theirs = ours[kept], theirs[kept]
        difference = (ours - theirs).abs().max().item()
        worst = difference if difference != difference else max(worst, difference)  # NaN stays
        if worst != worst:
            break
    return worst
