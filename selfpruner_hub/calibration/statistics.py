"""Statistics of the inputs of o_proj and down_proj, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.ridge import HELD_OUT, RIDGE, choose_ridge, split_held_out
from selfpruner_hub.calibration.sums import add_gram
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.layer_stream import Stream, check_finite
from selfpruner_hub.models.placement import placed
from selfpruner_hub.storage.run import DEFAULT_RUN, Run


@dataclass
class Moments:
    """First and second moments of a module's input x over tokens.

    Attributes:
        mean: E[x], `[D]`, float32.
        gram: E[x xᵀ], `[D, D]`, float32.
        ridge: λ for fits to these moments, in units of mean(diag E[x xᵀ]).
    """

    mean: Tensor
    gram: Tensor
    ridge: float = RIDGE

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
    """Calibration statistics of one decoder layer."""

    attention: Moments
    """Moments of the input of o_proj."""
    ffn: Moments
    """Moments of the input of down_proj."""


Ridges = Mapping[str, float]
"""λ of each part of a layer, by its name in `LayerStatistics`."""
MakeStatistics = Callable[[Ridges | None], LayerStatistics]
"""Function that ends the statistics of a layer: it takes λ where that is known, and else chooses it."""


@torch.inference_mode()
def calibrated(model: PreTrainedModel, windows: Tensor, run: Run = DEFAULT_RUN) -> Iterator[MakeStatistics]:
    """Stream the windows through the dense model, layer by layer, and sum the moments of every layer.

    One window in `HELD_OUT` is held out to choose λ of each projection (`ridge.choose_ridge`). The moments themselves
    use all windows. Of several processes, each reads a part of the windows, and the sums of a layer are those of all
    in the process that owns it.

    Memory: 8 · (D_ffn² + D_attention²) bytes for any number of tokens, and one hidden state per token.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`.
        run: Run context.

    Yields:
        What makes the statistics of each layer, once, while the layer is on the device of the model.

    Raises:
        ModelError: The activations are not finite.
    """
    architecture, layers = architecture_of(model.config), decoder_layers(model)
    stream = Stream(model, windows[ranks.share(len(windows), HELD_OUT)], run.store)
    for index, layer in enumerate(layers):
        with placed(layer, model.device):
            outputs = {"attention": architecture.attention_output, "ffn": architecture.ffn_output}
            modules = [linear(layer, path) for path in outputs.values()]
            sums = {part: _Sums(module) for part, module in zip(outputs, modules, strict=True)}
            with _hooked(zip(modules, sums.values(), strict=True)):
                stream.advance(index, layer)
            for each in sums.values():
                each.add_up()
            yield partial(_statistics, sums)
        run.progress("calibrating", index + 1, len(layers))


@torch.inference_mode()
def _statistics(sums: Mapping[str, _Sums], ridges: Ridges | None = None) -> LayerStatistics:
    return LayerStatistics(**{part: each.moments(ridges[part] if ridges else None) for part, each in sums.items()})


def calibrate(model: PreTrainedModel, windows: Tensor, run: Run = DEFAULT_RUN) -> list[LayerStatistics]:
    """Measure the moments of every layer, and keep them all; see `calibrated`."""
    return [measured(None) for measured in calibrated(model, windows, run)]


class _Sums:
    """A forward pre-hook that sums x and x xᵀ in float32, separately for held-out windows and the others."""

    def __init__(self, module: nn.Linear) -> None:
        self._weight = module.weight
        size = module.weight.shape[1]
        where: Any = {"dtype": torch.float32, "device": module.weight.device}
        self._windows = 0
        self._counts = torch.zeros(2, dtype=torch.long)
        self._sum = torch.zeros(size, **where)
        self._products = [torch.zeros(size, size, **where) for _ in range(2)]

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rows, held in split_held_out(self._windows, len(inputs[0])):
            x = inputs[0][rows].flatten(0, -2)
            self._counts[int(held)] += len(x)
            self._sum += x.sum(0, dtype=torch.float32)
            add_gram(self._products[held], x)
        self._windows += len(inputs[0])

    def add_up(self) -> None:
        """Add what the other processes summed."""
        ranks.total(self._sum, *self._products, self._counts)

    def moments(self, ridge: float | None) -> Moments:
        """Moments over all windows; the sums are used up. Without a λ, the one of least error on held-out windows."""
        fitted, held = self._products
        self._products = []  # the largest matrices of this pass are freed with the statistics
        check_finite([fitted, held])
        if ridge is None:
            ridge = choose_ridge(self._weight, fitted, held) if self._counts[1] else RIDGE
        total = int(self._counts.sum())
        return Moments(self._sum / total, fitted.add_(held).div_(total), ridge)


@contextmanager
def _hooked(pairs: Iterator[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
