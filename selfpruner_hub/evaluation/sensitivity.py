"""Predict the change of the loss when one layer of a pruned plan becomes a step narrower or wider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.sums import add_product
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.devices import summed
from selfpruner_hub.models.forward import Loss, head_gradient
from selfpruner_hub.models.layer_stream import Reached, backward_by_layer, watching
from selfpruner_hub.models.patching import frozen, with_layers
from selfpruner_hub.models.placement import placed
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects, step_channels
from selfpruner_hub.pruning.slicing import PARTS, Part, Slicer, units


def measure_steps(
    slicer: Slicer,
    plan: Plan,
    windows: Tensor,
    loss: Loss,
    curves: Sequence[LossCurves] | None = None,
    remains: float = 1.0,
    kv_multiple: int = 1,
) -> StepEffects:
    """Predict the effect of each small change of a plan on the loss, with one forward and one backward pass for all.

    The first-order term E[∂L/∂y · δy] uses the gradient of the pruned model, so it includes the interaction of the
    layers. The second-order term ½ E[δyᵀ F δy] is the difference of the loss curves: with nested least squares, the
    errors of two widths differ by exactly E[δyᵀ F δy].

    Args:
        slicer: Slicer of the dense model.
        plan: Plan to change.
        windows: Token ids, `[N, W]`; of several processes, the part that this one reads.
        loss: Loss that the search minimises, summed over positions.
        curves: Predicted losses of the layers alone, for the second-order term; None leaves it out.
        remains: Weight of the loss beyond the sum of the curves, in [0, 1] (`fitness.SecondRepairScore`).
        kv_multiple: Number of KV groups in a step of an attention.

    Returns:
        The predicted changes of the mean loss per predicted token.
    """
    model, layers, whole = slicer.model, slicer.layers(plan), decoder_layers(slicer.model)
    tokens = round(ranks.added(windows[:, 1:].numel()))
    effects: dict[str, list[float]] = {name: [float("inf")] * len(layers) for name in StepEffects.__annotations__}

    def last(first: int, hidden: Tensor) -> Tensor:
        """The head runs one window at a time; the last position of a window predicts nothing."""
        width = hidden.shape[1] - 1
        gradients = [head_gradient(model, each[:-1], loss, (first + i) * width) for i, each in enumerate(hidden)]
        return nn.functional.pad(torch.stack(gradients), (0, 0, 0, 1))

    with frozen(model), with_layers(model, layers):
        for index, layer, batches in backward_by_layer(model, windows, last, partial(_outputs, model), slicer.store):
            with placed(layer, model.device), placed(whole[index], model.device):
                changes = [_Change(slicer, index, part, plan, whole[index], layer, kv_multiple) for part in PARTS]
                with _watched(changes):
                    for gradients in batches:
                        for change, gradient in zip(changes, gradients, strict=True):
                            change.add(gradient)
                for change in changes:
                    change.add_up()
                    for name, predicted in change.predicted(tokens, curves, remains).items():
                        effects[f"{change.part}_{name}"][index] = predicted
    return StepEffects(**{name: tuple(values) for name, values in effects.items()})


class _Change:
    """The predicted change of the loss when one part of one layer loses a step, or gets one back.

    The first-order term is linear in the weight of the output projection: Σ gᵀ (W - W') x = ⟨W - W', Σ g xᵀ⟩, so the
    repaired weights of other widths are needed once, not for each batch.
    """

    def __init__(
        self,
        slicer: Slicer,
        index: int,
        part: Part,
        plan: Plan,
        dense: nn.Module,
        layer: nn.Module,
        kv_multiple: int,
    ) -> None:
        self.part = part
        self._index = index
        self._slicer = slicer
        self._kept, full = units(plan.layers[index], part), units(slicer.shape.dense.layers[index], part)
        step = kv_multiple if part == "attention" else step_channels(full)
        self._widths = {"removed": self._kept - step, "restored": min(self._kept + step, full)}
        self._widths = {n: w for n, w in self._widths.items() if 0 < w <= full and w != self._kept}
        if part == "attention" and slicer.shape.whole_attention:
            self._widths = {}
        which = PARTS.index(part)
        self.owner = _owners(slicer.model, layer)[which]
        self._weight = _outputs(slicer.model, layer)[which].weight
        self._dense_owner = _owners(slicer.model, dense)[which]
        self._dense_output = _outputs(slicer.model, dense)[which]
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        columns = max([self._kept, *self._widths.values()]) * self._weight.shape[1] // self._kept
        self._sum = self._weight.new_zeros(len(self._weight), columns, dtype=torch.float32)

    def called(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the call arguments of the pruned attention or FFN."""
        self._call = (
            tuple(a.detach() if isinstance(a, Tensor) else a for a in args),
            {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )

    @torch.no_grad()
    def add(self, gradient: Tensor) -> None:
        """Run the dense part on the pruned model's inputs, and add g xᵀ; x of a narrower part is its first columns."""
        if self._widths:
            reached = Reached(self._dense_output)
            with watching([reached]):
                self._dense_owner(*self._call[0], **self._call[1])
            x = reached.input[..., : self._sum.shape[1]]
            add_product(self._sum, gradient.flatten(0, -2), x.flatten(0, -2))

    def add_up(self) -> None:
        """Add what the other processes summed."""
        ranks.total(self._sum)

    def predicted(self, tokens: int, curves: Sequence[LossCurves] | None, remains: float) -> dict[str, float]:
        """Mean change of the loss per token in each direction; infinite if the width cannot change that way."""
        effects = {"removed": float("inf"), "restored": float("inf")}
        for name, width in self._widths.items():
            curve = None if curves is None else getattr(curves[self._index], self.part)
            alone = 0.0 if curve is None else float(curve[width] - curve[self._kept])
            effects[name] = remains * (self._first_order(width) / tokens + abs(alone)) + (1 - remains) * alone
        return effects

    def _first_order(self, width: int) -> float:
        """The change of the loss that another width of the part causes, to first order, summed over tokens."""
        weight = self._slicer.output_weight(self._index, self.part, width).to(self._sum.device)
        change = torch.zeros_like(self._sum)
        change[:, : weight.shape[1]] += weight
        change[:, : self._weight.shape[1]] -= self._weight.detach()
        return summed(change * self._sum)


def _outputs(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    architecture = architecture_of(model.config)
    return linear(layer, architecture.attention_output), linear(layer, architecture.ffn_output)


def _owners(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The attention and FFN modules that contain the output projections."""
    architecture = architecture_of(model.config)
    attention, ffn = architecture.attention_output.rpartition(".")[0], architecture.ffn_output.rpartition(".")[0]
    return layer.get_submodule(attention), layer.get_submodule(ffn)


@contextmanager
def _watched(changes: Sequence[_Change]) -> Iterator[None]:
    handles = [each.owner.register_forward_pre_hook(each.called, with_kwargs=True) for each in changes]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
