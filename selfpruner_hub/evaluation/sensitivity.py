"""Predict the change of the loss when one layer of a pruned plan becomes a step narrower or wider."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.models.forward import Loss, head_gradient
from selfpruner_hub.models.patching import frozen, with_layers
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects, step_channels
from selfpruner_hub.pruning.slicing import PARTS, Part, Slicer, units

PROBE_BATCH_TOKENS = 1024
"""Number of tokens in one forward and backward pass."""


def measure_steps(
    slicer: Slicer,
    plan: Plan,
    windows: Tensor,
    loss: Loss,
    curves: Sequence[LossCurves] | None = None,
    remains: float = 1.0,
) -> StepEffects:
    """Predict the effect of each small change of a plan on the loss, with one forward and one backward pass for all.

    The first-order term E[∂L/∂y · δy] uses the gradient of the pruned model, so it includes the interaction of the
    layers. The second-order term ½ E[δyᵀ F δy] is the difference of the loss curves: with nested least squares, the
    errors of two widths differ by exactly E[δyᵀ F δy].

    Args:
        slicer: Slicer of the dense model.
        plan: Plan to change.
        windows: Token ids, `[N, W]`.
        loss: Loss that the search minimises, summed over positions.
        curves: Predicted losses of the layers alone, for the second-order term; None leaves it out.
        remains: Weight of the loss beyond the sum of the curves, in [0, 1] (`fitness.SecondRepairScore`).

    Returns:
        The predicted changes of the mean loss per predicted token.
    """
    model, layers = slicer.model, slicer.layers(plan)
    changes = [_Change(slicer, index, part, plan) for index in range(len(layers)) for part in PARTS]
    modules = [module for layer in layers for module in _outputs(model, layer)]
    owners = [owner for layer in layers for owner in _owners(model, layer)]
    size = max(1, PROBE_BATCH_TOKENS // windows.shape[1])
    done = 0
    with contextmanager(_watched)(changes, modules, owners), with_layers(model, layers):
        for batch in windows.split(size):
            done = _backward(model, batch, done, loss)
            with torch.no_grad():
                for change in changes:
                    change.add()
    known: dict[str, list[float]] = {name: [] for name in StepEffects.__annotations__}
    for change in changes:
        for name, predicted in change.predicted(done, curves, remains).items():
            known[f"{change.part}_{name}"].append(predicted)
    return StepEffects(**{name: tuple(values) for name, values in known.items()})


class _Change:
    """The predicted change of the loss when one part of one layer loses a step, or gets one back."""

    def __init__(self, slicer: Slicer, index: int, part: Part, plan: Plan) -> None:
        self.part = part
        self._index = index
        self._slicer = slicer
        self._kept, full = units(plan.layers[index], part), units(slicer.shape.dense.layers[index], part)
        step = 1 if part == "attention" else step_channels(full)
        self._widths = {"removed": self._kept - step, "restored": min(self._kept + step, full)}
        self._widths = {n: w for n, w in self._widths.items() if 0 < w <= full and w != self._kept}
        if part == "attention" and slicer.shape.whole_attention:
            self._widths = {}
        self._sums = dict.fromkeys(self._widths, 0.0)
        dense = decoder_layers(slicer.model)[index]
        which = PARTS.index(part)
        self._dense_owner, self._dense_output = (
            _owners(slicer.model, dense)[which],
            _outputs(slicer.model, dense)[which],
        )
        self._call: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        self._output = self._gradient = torch.empty(0)

    def called(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the call arguments of the pruned attention or FFN."""
        self._call = (
            tuple(a.detach() if isinstance(a, Tensor) else a for a in args),
            {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()},
        )

    def returned(self, _module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        """Keep the output, and its gradient from the backward pass."""
        self._output = output.detach()

        def keep(gradient: Tensor) -> None:
            self._gradient = gradient

        output.register_hook(keep)

    def add(self) -> None:
        """Run the dense part on the pruned model's inputs, and add the first-order term of the other widths."""
        seen: list[Tensor] = []
        handle = self._dense_output.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        with _removed([handle]):
            self._dense_owner(*self._call[0], **self._call[1])
        for name, width in self._widths.items():
            weight = self._slicer.output_weight(self._index, self.part, width)
            moved = nn.functional.linear(seen[0][..., : weight.shape[1]], weight, self._dense_output.bias)
            self._sums[name] += (self._gradient.float() * (moved - self._output).float()).sum().item()

    def predicted(self, tokens: int, curves: Sequence[LossCurves] | None, remains: float) -> dict[str, float]:
        """Mean change of the loss per token in each direction; infinite if the width cannot change that way."""
        found = {"removed": float("inf"), "restored": float("inf")}
        for name, width in self._widths.items():
            curve = None if curves is None else getattr(curves[self._index], self.part)
            alone = 0.0 if curve is None else float(curve[width] - curve[self._kept])
            found[name] = remains * (self._sums[name] / tokens + abs(alone)) + (1 - remains) * alone
        return found


def _watched(changes: Sequence[_Change], modules: Sequence[nn.Module], owners: Sequence[nn.Module]) -> Iterator[None]:
    handles = [m.register_forward_hook(c.returned) for c, m in zip(changes, modules, strict=True)]
    handles += [m.register_forward_pre_hook(c.called, with_kwargs=True) for c, m in zip(changes, owners, strict=True)]
    with _removed(handles):
        yield


def _backward(model: PreTrainedModel, batch: Tensor, done: int, loss: Loss) -> int:
    """Run forward and backward, the head in chunks; `done` positions are finished before. Return how many are after."""
    with frozen(model):
        embedded = model.get_input_embeddings()(batch.to(model.device)).requires_grad_()
        hidden = model.get_decoder()(inputs_embeds=embedded, use_cache=False).last_hidden_state
        predicting = hidden[:, :-1].flatten(0, 1)
        predicting.backward(head_gradient(model, predicting.detach(), loss, done))
    return done + len(predicting)


def _outputs(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    architecture = architecture_of(model.config)
    return linear(layer, architecture.attention_output), linear(layer, architecture.ffn_output)


def _owners(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The attention and FFN modules that contain the output projections."""
    architecture = architecture_of(model.config)
    attention, ffn = architecture.attention_output.rpartition(".")[0], architecture.ffn_output.rpartition(".")[0]
    return layer.get_submodule(attention), layer.get_submodule(ffn)


@contextmanager
def _removed(handles: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
