"""Attention for runtimes that run a graph as it stands: no key or value is copied for the query heads that share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

NAME = "selfpruner_grouped"


def grouped_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with the query heads of a KV group as further rows of its one matrix product.

    transformers' own repeats keys and values to as many heads as the queries have. ONNX Runtime does that on a CPU at
    every step, for the whole cache, and turns the copies round as well: half of a step of SmolLM2 behind 512 tokens.

    Args:
        _module: Whose attention it is.
        query: `[B, Q, S, D]`.
        key: `[B, G, T, D]`, Q a multiple of G.
        value: `[B, G, T, D]`.
        attention_mask: Added to the scores, `[B, 1, S, T]`.
        scaling: Of the scores; None is 1/√D.
        softcap: c in c · tanh(scores / c); None leaves them.
        **_kwargs: What else models pass: the mask has it in it already.

    Returns:
        `[B, S, Q, D]`, and no weights.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    rows = (query * (size**-0.5 if scaling is None else scaling)).reshape(batch, groups, -1, size)
    scores = (rows @ key.transpose(2, 3)).view(batch, heads, length, -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    attended = weights.view(batch, groups, -1, weights.shape[-1]) @ value
    return attended.view(batch, heads, length, size).transpose(1, 2).contiguous(), None


@contextmanager
def attending_by_groups(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend so while it is traced."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
