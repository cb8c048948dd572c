"""Temporary changes of a model and of what loads it: mode, attention, layers, weights, precision, files read once."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.weights import rebuild_buffers

GROUPED_SDPA = "selfpruner_decoding"
GRAM_BLOCKS = 4
"""Number of blocks of columns of a symmetric product: with 4, it takes 10 of 16 products of blocks."""
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
def working_on(*models: PreTrainedModel) -> Iterator[None]:
    """Prepare models for work, such as pruning, measuring or exporting, and keep other threads from it meanwhile.

    Every module is in eval mode, and its own flag is restored at the end; buffers are those of the configuration
    (`weights.rebuild_buffers`), and outputs have names. Gradients can be taken and autocast is off, whatever the caller
    has set. A model must not run elsewhere until the context ends: its layers are replaced and its weights are
    reordered in place.

    Args:
        *models: Models to work on. The thread that works on a model may enter again.

    Yields:
        Nothing.

    Raises:
        UserError: Another thread works on one of the models.
    """
    with ExitStack() as stack:
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
def gguf_read_once() -> Iterator[None]:
    """Let transformers read a GGUF file once.

    It reads the file, vocabulary and all, for each of configuration, weights and tokenizer, and makes the names of its
    tensors anew for every module: of a small model, these and the slices of `_Reader` are most of the time to load it.

    Yields:
        Nothing.
    """
    with (
        replaced(gguf, "GGUFReader", functools.cache(_Reader)),
        replaced(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


class _Reader(gguf.GGUFReader):
    """Slices the file into plain arrays: a slice of a memory map, one for each word of a vocabulary, takes longer."""

    @property
    def data(self) -> Any:
        """The file."""
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)


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


@contextmanager
def ieee_products(cpu: str = "ieee") -> Iterator[None]:
    """Keep the factors of float32 products, factorisations and solves from being rounded temporarily.

    `torch.set_float32_matmul_precision("high")` and `"medium"`, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the
    environment, round them to TF32 or bfloat16 in the whole process: too coarse for least squares.

    Args:
        cpu: Precision of the factors on a CPU, `"ieee"` or `"bf16"`.

    Yields:
        Nothing.
    """
    settings: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each, precision in zip(settings, (cpu, "ieee"), strict=True):
            each.fp32_precision = precision
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add leftᵀ right to a float32 total, in place.

    The product of two bfloat16 numbers is exact in float32, so a CPU may multiply bfloat16 tensors in bfloat16 and sum
    them in float32: nothing is rounded, and it is several times faster. Other tensors are multiplied in float32,
    because a float32 factor would be rounded.

    Args:
        total: Sum, `[L, R]`, float32.
        left: Left factors, `[N, L]`.
        right: Right factors, `[N, R]`.
    """
    with ieee_products(cpu="bf16" if left.dtype == right.dtype == torch.bfloat16 else "ieee"):
        total.addmm_(left.float().t(), right.float())


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀ x to a symmetric float32 total, in place, as `add_product` does; the lower half is mirrored, not computed.

    Args:
        total: Sum, `[D, D]`, float32, symmetric.
        x: Factors, `[N, D]`.
    """
    width = -(-x.shape[1] // GRAM_BLOCKS)
    for first in range(0, x.shape[1], width):
        rows = slice(first, first + width)
        add_product(total[rows, first:], x[:, rows], x[:, first:])
        total[first + width :, rows] = total[rows, first + width :].t()


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)
