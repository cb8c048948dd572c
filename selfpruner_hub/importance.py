"""Which channels and KV groups go first: scores from weights and calibration statistics, and the order they give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.architectures import architecture_of, decoder_layers, linear, shape_of
from selfpruner_hub.calibration import LayerStatistics, Moments
from selfpruner_hub.errors import UserError


def wanda_sp(weight: Tensor, moments: Moments) -> Tensor:
    """Σ_i |W_ij| · ‖x_j‖₂, up to the token count (Wanda, arXiv 2306.11695, summed over outputs as in FLAP's -sp)."""
    return weight.abs().sum(0) * moments.energy.clamp_min(0).sqrt()


def flap(weight: Tensor, moments: Moments) -> Tensor:
    """Var(x_j) · ‖W_:,j‖² (FLAP, arXiv 2312.11983)."""
    return moments.variance * weight.square().sum(0)


def energy(weight: Tensor, moments: Moments) -> Tensor:
    """E[x_j²] · ‖W_:,j‖²: the expected squared output of column j."""
    return moments.energy * weight.square().sum(0)


SCORES: dict[str, Callable[[Tensor, Moments], Tensor]] = {"wanda-sp": wanda_sp, "flap": flap, "energy": energy}
"""Column scores: weight `[out, in]` and the moments of its input to `[in]`, greater is more important."""


@dataclass(frozen=True)
class LayerOrder:
    """Dense indices, most important first.

    Attributes:
        groups: KV groups, `[G]`, int64.
        channels: FFN channels, `[F]`, int64.
    """

    groups: Tensor
    channels: Tensor

    def inverse(self) -> LayerOrder:
        """The order that undoes this one."""
        return LayerOrder(self.groups.argsort(), self.channels.argsort())


@torch.inference_mode()
def rank(model: PreTrainedModel, statistics: Sequence[LayerStatistics], score: str = "wanda-sp") -> list[LayerOrder]:
    """Order every layer's KV groups and FFN channels by importance.

    A KV group's score is the sum over its columns of o_proj.

    Args:
        model: The dense model.
        statistics: What `calibrate` returned for it.
        score: A key of `SCORES`.

    Returns:
        One `LayerOrder` per layer.

    Raises:
        UserError: The score is unknown.
    """
    if score not in SCORES:
        raise UserError(f"Unknown importance {score!r}.", f"Choose one of: {', '.join(SCORES)}.")
    architecture = architecture_of(model.config)
    orders = []
    for layer, known, dense in zip(decoder_layers(model), statistics, shape_of(model.config).dense.layers, strict=True):
        columns = SCORES[score](linear(layer, architecture.attention_output).weight.float(), known.attention)
        channels = SCORES[score](linear(layer, architecture.ffn_output).weight.float(), known.ffn)
        groups = columns.view(dense.num_key_value_heads, -1).sum(1)
        orders.append(
            LayerOrder(
                groups.argsort(descending=True, stable=True),
                channels.argsort(descending=True, stable=True),
            )
        )
    return orders
