"""Other training-free structured methods, by their papers' formulas: the baselines of `front.py`.

They remove FFN channels, KV groups or whole layers, and refit no weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.statistics import LayerStatistics, Moments
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear, shape_of
from selfpruner_hub.plans.plan import LayerWidths, Plan
from selfpruner_hub.pruning.importance import LayerOrder, expand, flap
from selfpruner_hub.pruning.slicing import Slicer


def by_channels(model: PreTrainedModel, scores: Sequence[Tensor]) -> list[LayerOrder]:
    """Order the FFN channels by score, the highest first; KV groups keep their order."""
    groups = [torch.arange(widths.num_key_value_heads) for widths in shape_of(model.config).dense.layers]
    return [LayerOrder(of, each.argsort(descending=True, stable=True)) for of, each in zip(groups, scores, strict=True)]


def taylor(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """Σ |w · ∂L/∂w| over the weights of each FFN channel, `[F]` for each layer.

    This is LLM-Pruner's first-order, element-wise score (arXiv 2305.11627, equation 5), computed by Torch-Pruning. L is
    the sum of the windows' language-model losses.
    """
    model.requires_grad_(False)
    modules = [m for layer in decoder_layers(model) for m in _projections(model, layer)]
    for module in modules:
        module.weight.requires_grad_(True)
    try:
        for window in windows.split(1):
            model(input_ids=window, labels=window, use_cache=False).loss.backward()
        return _scores(model, tp.importance.GroupTaylorImportance(normalizer=None))
    finally:
        for module in modules:
            module.weight.grad = None


def _scores(model: PreTrainedModel, importance: Callable[[Any], Tensor]) -> list[Tensor]:
    """Torch-Pruning's score of each FFN channel of each layer; its dependency graph finds the coupled weights."""
    model.requires_grad_(True)  # Torch-Pruning traces the graph of a backward pass
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it does not know the norms' modules; they are not pruned
        graph = tp.DependencyGraph().build_dependency(
            model, ids, forward_fn=lambda model, ids: model(ids, use_cache=False).logits
        )
    found = []
    for layer in decoder_layers(model):
        down = linear(layer, architecture_of(model.config).ffn_output)
        group = graph.get_pruning_group(down, tp.prune_linear_in_channels, list(range(down.in_features)))
        found.append(importance(group).detach())
    return found


@torch.inference_mode()
def block_influence(model: PreTrainedModel, windows: Tensor) -> list[float]:
    """1 - E[cos(input, output)] of each decoder layer, mean over tokens (ShortGPT, arXiv 2403.03853, equation 1)."""
    sums = [0.0] * len(decoder_layers(model))

    def watch(index: int) -> object:
        def add(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            sums[index] += (1 - nn.functional.cosine_similarity(before.float(), output.float(), dim=-1)).sum().item()

        return add

    handles = [
        layer.register_forward_hook(watch(index), with_kwargs=True) for index, layer in enumerate(decoder_layers(model))
    ]
    try:
        for window in windows.split(4):
            model.get_decoder()(window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [value / windows.numel() for value in sums]


def without_blocks(model: PreTrainedModel, influence: Sequence[float], beta: float) -> nn.ModuleList:
    """The decoder layers without the share β of them with the lowest influence."""
    layers = decoder_layers(model)
    least = sorted(range(len(layers)), key=lambda index: influence[index])[: round(beta * len(layers))]
    return nn.ModuleList(layer for index, layer in enumerate(layers) if index not in least)


class Flap:
    """FLAP (arXiv 2312.11983): one threshold for the standardised scores of all layers, and bias compensation.

    Args:
        model: The dense model.
        statistics: Calibration statistics, one for each layer.
    """

    def __init__(self, model: PreTrainedModel, statistics: Sequence[LayerStatistics]) -> None:
        architecture = architecture_of(model.config)
        self._paths = (architecture.attention_output, architecture.ffn_output)
        self._shape = shape_of(model.config)
        self._statistics = statistics
        self._scores: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for layer, known, dense in zip(decoder_layers(model), statistics, self._shape.dense.layers, strict=True):
                columns, channels = (
                    flap(linear(layer, path).weight.float(), moments)
                    for path, moments in zip(self._paths, (known.attention, known.ffn), strict=True)
                )
                groups = columns.view(dense.num_key_value_heads, -1).sum(1)
                self._scores.append((_standardised(groups), _standardised(channels)))
        self.order = [
            LayerOrder(*(scores.argsort(descending=True, stable=True) for scores in pair)) for pair in self._scores
        ]

    def plan(self, beta: float) -> Plan:
        """Plan that removes the units with the lowest scores, until the share β of the weights is removed."""
        costs = (self._shape.group_weights, self._shape.unit_weights)
        units = []
        for index, pair in enumerate(self._scores):
            for part, (scores, cost) in enumerate(zip(pair, costs, strict=True)):
                ranked = scores.sort(descending=True).values.tolist()
                units += [(score, index, part, cost) for score in ranked[1:]]  # keep at least one group and one channel
        kept = [[len(groups), len(channels)] for groups, channels in self._scores]
        left = beta * self._shape.weights(self._shape.dense)
        for _score, index, part, cost in sorted(units):
            if left < cost / 2:
                break
            kept[index][part] -= 1
            left -= cost
        return Plan(tuple(LayerWidths(channels, groups) for groups, channels in kept))

    @torch.no_grad()
    def layers(self, model: PreTrainedModel, plan: Plan) -> nn.ModuleList:
        """Cut a plan's decoder layers, and add the bias W_R E[x_R] of the removed columns R to each output projection.

        Args:
            model: Dense model, in this order of importance (`ordering.ordered`).
            plan: Widths to keep.

        Returns:
            The decoder layers.
        """
        slicer = Slicer(model)
        cut = slicer.layers(plan)
        for dense, layer, known, order in zip(decoder_layers(model), cut, self._statistics, self.order, strict=True):
            columns = (expand(order.groups, slicer.unit("query")), order.channels)
            for path, moments, by in zip(self._paths, (known.attention, known.ffn), columns, strict=True):
                _add_lost_mean(linear(dense, path), linear(layer, path), moments, by)
        return cut


def _add_lost_mean(dense: nn.Linear, cut: nn.Linear, moments: Moments, order: Tensor) -> None:
    lost = dense.weight[:, cut.weight.shape[1] :].float() @ moments.mean[order][cut.weight.shape[1] :]
    bias = lost if cut.bias is None else cut.bias.float() + lost
    cut.bias = nn.Parameter(bias.to(cut.weight.dtype), requires_grad=False)


def _standardised(scores: Tensor) -> Tensor:
    return (scores - scores.mean()) / (scores.std() + 1e-12)


def _projections(model: PreTrainedModel, layer: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """Gate, up and down of a layer whose projections are not fused."""
    inputs = [linear(layer, p.path) for p in architecture_of(model.config).ffn_inputs]
    gate, up = inputs
    return gate, up, linear(layer, architecture_of(model.config).ffn_output)
