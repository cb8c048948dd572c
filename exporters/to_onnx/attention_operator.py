"""Attention as a single ONNX operator, for runtimes that do not fuse the graph themselves."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch.onnx.ops
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from selfpruner_hub.models.patching import attending_by

ATTENTION_OPERATOR = "selfpruner_operator"
OPSET = 23
"""First ONNX opset with the operator `Attention`."""


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
    """Compute attention with ONNX's `Attention` operator.

    A trace of transformers' own attention repeats keys and values to the number of query heads, and writes every
    product, mask and softmax to memory. ONNX Runtime does so on a CPU at every step, for the whole cache. Its kernel of
    `Attention` reads each KV group in place and works head by head. Use this for traces only: PyTorch's version of the
    operator applies the softcap after the mask.

    Args:
        _module: Attention module; unused.
        query: Queries, `[B, Q, S, D]`.
        key: Keys, `[B, G, T, D]`; Q is a multiple of G.
        value: Values, `[B, G, T, D]`.
        attention_mask: Mask that is added to the scores, `[B, 1, S, T]`.
        scaling: Factor of the scores; None takes 1/√D.
        softcap: Constant c in c · tanh(scores / c); None leaves the scores as they are.
        **_kwargs: Other arguments that models pass; unused, because the mask contains their effect.

    Returns:
        The output, `[B, S, Q, D]`, and None for the attention weights.
    """
    attended, *_ = torch.onnx.ops.attention(
        query, key, value, attention_mask, scale=scaling, softcap=0.0 if softcap is None else softcap
    )
    return attended.transpose(1, 2).contiguous(), None


def attending_by_operator(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Make a model use `attention_operator` while it is traced."""
    return attending_by(model, ATTENTION_OPERATOR)


AttentionInterface.register(ATTENTION_OPERATOR, attention_operator)
AttentionMaskInterface.register(ATTENTION_OPERATOR, eager_mask)
