"""What a router and its experts compute, for every token and every expert, and after experts are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from selfpruner_hub.models.mixtures.table import Experts, Sum


@dataclass(frozen=True)
class Routing:
    """The routing of some tokens in one layer, from which that among fewer experts follows.

    Attributes:
        weights: Weight of each expert before any division, `[T, E]`, float32, above 0.
        bias: Bias of the choice, `[E]`; None where the greatest weights are chosen.
        top_k: Number of experts that a token is routed to.
        divided_by: What the weights of the chosen experts are divided by.
        scale: Factor of the divided weights.
        shares: Whether the bias is added to shares of the sum over all experts, as in a softmax; else to weights.
    """

    weights: Tensor
    bias: Tensor | None
    top_k: int
    divided_by: Sum
    scale: float = 1.0
    shares: bool = False

    def routed(self, alive: Tensor) -> tuple[Tensor, Tensor]:
        """Experts that each token is routed to among those that are alive, best first, and their gates, `[T, k]` each.

        k is `top_k`, or the number of those that are alive where they are fewer.
        """
        scores, total = self.weights, self.weights @ alive.to(self.weights.dtype)
        if self.bias is not None:
            if self.shares:
                scores = scores / total[:, None]
            scores = scores + self.bias
        count = min(self.top_k, int(alive.sum()))
        indices = scores.masked_fill(~alive, -torch.inf).topk(count, dim=-1).indices
        chosen = self.weights.gather(1, indices)
        divisor = {"chosen": chosen.sum(-1), "alive": total, "nothing": torch.ones_like(total)}[self.divided_by]
        return indices, self.scale * chosen / divisor[:, None]

    def gates(self, alive: Tensor) -> Tensor:
        """Factors of the experts' outputs, `[T, E]`: 0 for those that a token is not routed to."""
        indices, gates = self.routed(alive)
        return torch.zeros_like(self.weights).scatter_(1, indices, gates)


def routing_of(row: Experts, config: PreTrainedConfig, layer: nn.Module, x: Tensor) -> Routing:
    """Route tokens in a layer.

    Args:
        row: Row of the model's experts.
        config: Configuration of the model.
        layer: Decoder layer with experts.
        x: Inputs of the router, `[T, H]`.

    Returns:
        Their routing, in float32.
    """
    block: Any = layer.get_submodule(row.block)
    router: Any = block.get_submodule(row.router)
    bias, dtype = getattr(router, "bias", None), torch.float32 if row.in_float32 else router.weight.dtype
    bias = None if bias is None else bias.to(dtype)
    logits = nn.functional.linear(x.to(dtype), router.weight.to(dtype), bias).float()
    weights = logits.sigmoid() if row.sigmoid else (logits - logits.max(-1, keepdim=True).values).exp()
    choice = None
    if row.bias:
        owner, _, name = row.bias.rpartition(".")
        choice = getattr(block.get_submodule(owner), name).float().flatten()
    scale = float(getattr(config, row.scale)) if row.scale else 1.0
    return Routing(weights, choice, router.top_k, row.sum_of(config), scale, not row.sigmoid)


def activations(experts: Any, index: int, x: Tensor) -> Tensor:
    """Compute what an expert's output projection reads, `[T, I]`, from inputs of the block, `[T, H]`."""
    weight = experts.gate_up_proj[index]
    up = x @ weight if experts.is_transposed else nn.functional.linear(x, weight)
    if experts.has_bias:
        up = up + experts.gate_up_proj_bias[index]
    activated: Tensor = experts._apply_gate(up)
    return activated


def output_weight(experts: Any, index: int) -> Tensor:
    """The weight of an expert's output projection, `[H, I]`: a view, which can be written to."""
    weight: Tensor = experts.down_proj[index]
    return weight.t() if experts.is_transposed else weight


def shared_output(row: Experts, layer: nn.Module) -> nn.Linear | None:
    """The output projection of a layer's shared expert; None where it has none."""
    module: Any = layer
    for name in filter(None, row.shared.split(".")):
        module = getattr(module, name, None)
    return module if isinstance(module, nn.Linear) else None


def expert_output(experts: Any, index: int, x: Tensor) -> Tensor:
    """Compute the output of an expert, `[T, H]`, for every token, whatever its routing."""
    output = nn.functional.linear(activations(experts, index, x), output_weight(experts, index))
    return output + experts.down_proj_bias[index] if experts.has_bias else output
