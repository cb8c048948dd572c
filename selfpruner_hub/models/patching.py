"""Temporary changes of a model: mode, attention, layers, gradients, attributes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.weights import rebuild_buffers

GROUPED_SDPA = "selfpruner_decoding"
_locks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
"""A lock of each model, held by the thread that works on it."""


def grouped_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers' `sdpa` does with a mask, even if there is none.

    Without a mask, transformers lets PyTorch share keys and values (`enable_gqa`). PyTorch's CPU kernel then reads them
    once for every query head, and a step takes many times longer than if the heads of a group are rows of one product,
    which is what transformers does with a mask.

    Args:
        module: The attention module.
        query: Queries, `[B, Q, S, D]`.
        key: Keys, `[B, G, T, D]`; Q is a multiple of G.
        value: Values, `[B, G, T, D]`.
        attention_mask: Mask, `[B, 1, S, T]`; None masks only the future.
        **kwargs: Keywords of `sdpa_attention_forward`.

    Returns:
        Attention output, `[B, S, Q, D]`, and None for the attention weights.
    """
    if attention_mask is None and query.shape[2] == 1:
        attention_mask = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute of an object temporarily; on exit, its own attribute or that of its class is restored."""
    attributes = vars(owner)
    before, had = attributes.get(name), name in attributes
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def working_on(*models: PreTrainedModel) -> Iterator[None]:
    """Prepare models for work, such as pruning, measuring or exporting, and keep other threads from it meanwhile.

    Every module is in eval mode, and its own flag is restored at the end; buffers are those of the configuration
    (`weights.rebuild_buffers`), and outputs have names. Gradients can be taken, autocast is off, and tensors without a
    device are made on the CPU, whatever the caller has set. A model must not run elsewhere until the context ends: its
    layers are replaced and its weights are reordered in place.

    Args:
        *models: Models to work on. The thread that works on a model may enter again.

    Yields:
        Nothing.

    Raises:
        UserError: Another thread works on one of the models.
    """
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for model in models:
            lock = _locks.setdefault(model, threading.RLock())
            if not lock.acquire(blocking=False):
                raise UserError(
                    "Another thread works on this model object.",
                    "Wait until it has finished, or load the model once for each thread.",
                )
            stack.callback(lock.release)
            stack.callback(_set_modes, [(module, module.training) for module in model.modules()])
            stack.enter_context(replaced(model.config, "return_dict", True))
            model.eval()
            rebuild_buffers(model)
            for kind in {"cpu", model.device.type}:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield


def _set_modes(modes: list[tuple[nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


@contextmanager
def attending_by(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model use a registered attention function temporarily."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def attending_by_group(model: PreTrainedModel) -> AbstractContextManager[None]:
    """Let a model that uses `sdpa` on a CPU use `grouped_sdpa` temporarily, for generation; others do not change."""
    fits = model.config._attn_implementation == "sdpa" and model.device.type == "cpu"
    return attending_by(model, GROUPED_SDPA) if fits else nullcontext()


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Turn off the gradients of the weights temporarily; they would take as much memory as the weights."""
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
    """Let `model` run with other decoder layers temporarily."""
    decoder = model.get_decoder()
    dense = decoder.layers
    decoder.layers = layers
    try:
        yield model
    finally:
        decoder.layers = dense


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
