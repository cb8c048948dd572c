"""Models changed for a while: other attention, other layers, no gradients, another precision of products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "selfpruner_decoding"


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' `sdpa` does under a mask.

    Where there is no mask, it lets PyTorch share keys and values (`enable_gqa`). PyTorch's kernel for CPUs then reads
    them once for every query head, and a step takes many times as long as with the heads of a group as rows of one
    product, which is what transformers does where there is a mask.

    Args:
        module: Whose attention it is.
        query: `[B, Q, S, D]`.
        key: `[B, G, T, D]`, Q a multiple of G.
        value: `[B, G, T, D]`.
        attention_mask: `[B, 1, S, T]`, or None where nothing but the future is masked.
        **kwargs: What `sdpa_attention_forward` takes.

    Returns:
        `[B, S, Q, D]`, and no weights.
    """
    if attention_mask is None and query.shape[2] == 1:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module or an object another attribute for a while; one that its class has shows again at the end."""
    own = vars(owner)
    before, had = own.get(name), name in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model attend by a registered function for a while."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attending_by_group(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model attend by `grouped_sdpa` while it writes, where it attends by `sdpa` on a CPU."""
    fits = model.config._attn_implementation == "sdpa" and model.device.type == "cpu"
    return attending_by(model, NAME) if fits else nullcontext()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """No gradients of the weights for a while: they would take as much memory as the weights do."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def with_layers(model: PreTrainedModel, layers: nn.ModuleList) -> Iterator[PreTrainedModel]:
    """Let `model` run with other decoder layers for a while."""
    decoder = model.get_decoder()
    dense = decoder.layers
    decoder.layers = layers
    try:
        yield model
    finally:
        decoder.layers = dense


@contextmanager
def exact_in_float32(dtype: torch.dtype) -> Iterator[None]:
    """Multiply float32 copies of bfloat16 values in bfloat16 with float32 sums: exact, and several times faster."""
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)
