"""Attention as the one ONNX operator that it is: for runtimes that run a graph as it stands."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.onnx.ops
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from selfpruner_hub.models.patching import attending_by

NAME = "selfpruner_operator"
OPSET = 23
"""The first that has `Attention`."""


def attention_operator(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by ONNX's `Attention`.

    Traced from transformers' own, keys and values are repeated to as many heads as the queries have, and every product,
    mask and softmax goes through memory by itself: ONNX Runtime does all that on a CPU at every step, for the whole
    cache. Its kernel of the operator reads a KV group where it is, and works head by head. For traces alone: PyTorch's
    own version caps what is masked already.

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
    attended, *_ = torch.onnx.ops.attention(
        query, key, value, attention_mask, scale=scaling, softcap=0.0 if softcap is None else softcap
    )
    return attended.transpose(1, 2).contiguous(), None


def attending_by_operator(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model attend so while it is traced."""
    return attending_by(model, NAME)


AttentionInterface.register(NAME, attention_operator)
AttentionMaskInterface.register(NAME, eager_mask)
