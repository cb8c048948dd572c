"""Statistics of the inputs of o_proj and down_proj, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.ridge import RIDGE, choose_ridge, split_held_out
from selfpruner_hub.calibration.sums import add_gram
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.layer_stream import Stream, check_finite
from selfpruner_hub.models.placement import placed
from selfpruner_hub.storage.offload import TensorStore
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

    def to(self, device: torch.device) -> Moments:
        """The same moments on a device."""
        return Moments(self.mean.to(device), self.gram.to(device), self.ridge)

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

    def tensors(self) -> dict[str, Tensor]:
        """All statistics as named tensors."""
        return {
            f"{part}.{name}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
            for part, moments in vars(self).items()
            for name, value in vars(moments).items()
        }

    @classmethod
    def of(cls, tensors: dict[str, Tensor], store: TensorStore) -> LayerStatistics:
        """Rebuild from the result of `tensors`; the second moments are put into `store`."""
        return cls(
            *(
                Moments(tensors[f"{part}.mean"], store(tensors[f"{part}.gram"]), tensors[f"{part}.ridge"].item())
                for part in ("attention", "ffn")
            )
        )


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    windows: Tensor,
    run: Run = DEFAULT_RUN,
) -> list[LayerStatistics]:
    """Stream the windows through the dense model, layer by layer, and measure the moments of every layer.

    One window in `HELD_OUT` is held out to choose λ of each projection (`ridge.choose_ridge`). The moments themselves
    use all windows.

    Memory: 4 · (D_ffn² + D_attention²) bytes per layer, for any number of tokens, and one hidden state per token.

    Args:
        model: The dense model.
        windows: Token ids, `[N, W]`.
        run: Run context; its checkpoints keep finished layers.

    Returns:
        One `LayerStatistics` per layer.

    Raises:
        ModelError: The activations are not finite.
    """
    architecture = architecture_of(model.config)
    layers = decoder_layers(model)
    store, checkpoints = run.store, run.checkpoints
    statistics: list[LayerStatistics] = []
    while tensors := checkpoints.load(f"calibration-{len(statistics)}", model.device):
        statistics.append(LayerStatistics.of(tensors, store))
    stream = Stream(model, windows, store) if len(statistics) < len(layers) else None
    for index, layer in enumerate(layers):
        if stream is None:
            break
        if index < len(statistics):
            stream.advance(index, layer)
            continue
        with placed(layer, model.device):
            modules = [linear(layer, path) for path in (architecture.attention_output, architecture.ffn_output)]
            sums = [_Sums(module) for module in modules]
            with _hooked(zip(modules, sums, strict=True)):
                stream.advance(index, layer)
            statistics.append(LayerStatistics(*(each.moments(store) for each in sums)))
        checkpoints.save(f"calibration-{index}", statistics[-1].tensors())
        run.progress("calibrating", index + 1, len(layers))
    return statistics


class _Sums:
    """A forward pre-hook that sums x and x xᵀ in float32, separately for held-out windows and the others."""

    def __init__(self, module: nn.Linear) -> None:
        self._weight = module.weight
        size = module.weight.shape[1]
        where: Any = {"dtype": torch.float32, "device": module.weight.device}
        self._windows = 0
        self._counts = [0, 0]
        self._sum = torch.zeros(size, **where)
        self._products = [torch.zeros(size, size, **where) for _ in self._counts]

    def __call__(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for rows, held in split_held_out(self._windows, len(inputs[0])):
            x = inputs[0][rows].flatten(0, -2)
            self._counts[held] += len(x)
            self._sum += x.sum(0, dtype=torch.float32)
            add_gram(self._products[held], x)
        self._windows += len(inputs[0])

    def moments(self, store: TensorStore) -> Moments:
        fitted, held = self._products
        total = sum(self._counts)
        check_finite(self._products)
        ridge = choose_ridge(self._weight, fitted, held) if self._counts[1] else RIDGE
        return Moments(self._sum / total, store(fitted.add_(held).div_(total)), ridge)


@contextmanager
def _hooked(pairs: Iterator[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
