"""Statistics of the inputs of o_proj and down_proj: one pass over the windows, in memory independent of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.corpus import Progress
from selfpruner_hub.errors import ModelError

BATCH_TOKENS = 4096
"""Tokens in one forward pass."""


@dataclass
class Moments:
    """First and second moments of a module's input x over tokens.

    Attributes:
        mean: E[x], `[D]`, float32.
        gram: E[x xᵀ], `[D, D]`, float32.
    """

    mean: Tensor
    gram: Tensor

    @property
    def energy(self) -> Tensor:
        """E[x_j²], `[D]`."""
        return self.gram.diagonal()

    @property
    def variance(self) -> Tensor:
        """Var(x_j), `[D]`, not below 0."""
        return (self.energy - self.mean.square()).clamp_min(0)


@dataclass
class LayerStatistics:
    """What calibration knows of one decoder layer."""

    attention: Moments
    """Of the input of o_proj."""
    ffn: Moments
    """Of the input of down_proj."""


@torch.inference_mode()
def calibrate(model: PreTrainedModel, windows: Tensor, progress: Progress | None = None) -> list[LayerStatistics]:
    """Stream the windows through the dense model and accumulate the moments of every layer.

    Memory: 4 · (D_ffn² + D_attention²) bytes a layer, whatever the number of tokens.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`.
        progress: Told how many windows are done.

    Returns:
        One `LayerStatistics` per layer.

    Raises:
        ModelError: The activations are not finite.
    """
    architecture = architecture_of(model.config)
    paths = (architecture.attention_output, architecture.ffn_output)
    modules = [linear(layer, path) for layer in decoder_layers(model) for path in paths]
    accumulators = [_Accumulator(module) for module in modules]
    decoder = model.get_decoder()
    size = max(1, BATCH_TOKENS // windows.shape[1])
    with exact_in_float32(model.dtype), _hooked(zip(modules, accumulators, strict=True)):
        for start in range(0, len(windows), size):
            decoder(windows[start : start + size].to(model.device), use_cache=False)
            if progress:
                progress("calibrating", min(start + size, len(windows)), len(windows))
    moments = [accumulator.moments() for accumulator in accumulators]
    if not all(m.gram.isfinite().all() for m in moments):
        raise ModelError("The model's activations are not finite.", "Check its weights, or load it in float32.")
    return [LayerStatistics(a, f) for a, f in zip(moments[::2], moments[1::2], strict=True)]


class _Accumulator:
    """A forward pre-hook that sums x and x xᵀ in float32."""

    def __init__(self, module: nn.Linear) -> None:
        weight = module.weight
        self.count = 0
        self.sum = torch.zeros(weight.shape[1], device=weight.device)
        self.products = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()
        self.count += len(x)
        self.sum += x.sum(0)
        self.products.addmm_(x.t(), x)

    def moments(self) -> Moments:
        return Moments(self.sum / self.count, self.products / self.count)


@contextmanager
def _hooked(pairs: Iterator[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
