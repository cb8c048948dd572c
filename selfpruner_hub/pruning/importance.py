"""Order of importance of FFN channels and KV groups, from weights and calibration statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.calibration.ridge import as_seen, damped_factor, rounded_factor
from selfpruner_hub.calibration.statistics import LayerStatistics, Moments
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear, shape_of
from selfpruner_hub.models.devices import ieee_products

Order = Callable[[Tensor, Moments, int, Tensor | None], Tensor]
"""Function that returns the indices of the units, most important first, `[in / unit]`. Its arguments: the weight
`[out, in]`, the moments of its input, the number of columns per unit (those of a KV group's query heads, or 1), and R
of its output (see `fisher.output_fisher`), which only OBS reads."""


def wanda_sp(weight: Tensor, moments: Moments) -> Tensor:
    """Σ_i |W_ij| · ‖x_j‖₂, up to a constant factor (Wanda, arXiv 2306.11695, summed over outputs as in FLAP's -sp)."""
    return weight.abs().sum(0) * moments.energy.clamp_min(0).sqrt()


def flap(weight: Tensor, moments: Moments) -> Tensor:
    """Var(x_j) · ‖W_:,j‖² (FLAP, arXiv 2312.11983)."""
    return moments.variance * weight.square().sum(0)


def energy(weight: Tensor, moments: Moments) -> Tensor:
    """E[x_j²] · ‖W_:,j‖²: the expected squared output of column j."""
    return moments.energy * weight.square().sum(0)


def expand(indices: Tensor, unit: int) -> Tensor:
    """Turn indices of units into indices of their rows: unit `i` covers rows `i * unit` to `(i + 1) * unit - 1`."""
    return (indices[:, None] * unit + torch.arange(unit, device=indices.device)).flatten()


def by_score(score: Callable[[Tensor, Moments], Tensor]) -> Order:
    """Make an order function that ranks units by the sum of the scores of their columns."""
    return lambda weight, moments, unit, _root: (
        score(weight, moments).view(-1, unit).sum(1).argsort(descending=True, stable=True)
    )


@ieee_products()
def obs(weight: Tensor, moments: Moments, unit: int, root: Tensor | None = None) -> Tensor:
    """Structured OBS (ZipLM, arXiv 2302.04089, equations 3 and 4): one sweep removes unit after unit.

    H = E[x xᵀ] + λ · mean(diag) · I. Each step removes the unit g with the least tr(W_g [(H⁻¹)_gg]⁻¹ W_gᵀ), the squared
    error of the output after repair, and updates W and H⁻¹. With the Fisher information RᵀR of the output, R W replaces
    W, and the error is twice the second-order loss of the model. With more than `STEPS` units, a step removes several.
    Cost: one inversion of H, cubic in the columns, then at most `STEPS` updates of H⁻¹.
    """
    inverse = torch.cholesky_inverse(damped_factor(moments.gram, moments.ridge))
    columns = as_seen(weight, root).t().contiguous()  # [in, out], updated as units are removed
    left = torch.arange(len(columns) // unit, device=weight.device)
    gone = torch.zeros_like(left, dtype=torch.bool)
    together = -(-len(left) // STEPS)
    removed: list[Tensor] = []
    for step in range(-(-len(left) // together) - 1):
        if step and step % COMPACTED == 0:  # drop the rows and columns of removed units
            rows = expand((~gone).nonzero()[:, 0], unit)
            inverse, columns, left, gone = inverse[rows][:, rows], columns[rows], left[~gone], gone[~gone]
        losses = _losses(inverse, columns, unit).masked_fill(gone, torch.inf)
        least = losses.topk(together, largest=False).indices
        rows = expand(least, unit)
        moved = torch.cholesky_solve(inverse[rows], rounded_factor(inverse[rows][:, rows]))
        columns.addmm_(moved.t(), columns[rows], alpha=-1)
        inverse.addmm_(moved.t(), inverse[rows], alpha=-1)
        inverse[rows], inverse[:, rows] = 0, 0
        inverse[rows, rows] = 1
        gone[least] = True
        removed.append(left[least])
    return torch.cat([left[~gone], *reversed(removed)])


def _losses(inverse: Tensor, columns: Tensor, unit: int) -> Tensor:
    """tr(W_g [(H⁻¹)_gg]⁻¹ W_gᵀ) of every unit."""
    if unit == 1:  # the same value, without a Cholesky factor for each of thousands of scalars
        return columns.square().sum(1) / inverse.diagonal()
    count = len(columns) // unit
    blocks = inverse.view(count, unit, count, unit).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors = rounded_factor(blocks)
    whitened = torch.linalg.solve_triangular(factors, columns.view(count, unit, -1), upper=False)
    return whitened.square().sum((1, 2))


STEPS = 128
"""Maximum number of steps of `obs` for one projection; with 512 or 2048 the error on other text is no lower."""
COMPACTED = 32
"""Number of steps of `obs` after which its matrices are reduced to the remaining units."""
ORDERS: dict[str, Order] = {
    "wanda-sp": by_score(wanda_sp),
    "flap": by_score(flap),
    "energy": by_score(energy),
    "obs": obs,
}


@dataclass(frozen=True)
class LayerOrder:
    """Indices of one layer's units in the dense model, most important first.

    Attributes:
        groups: Indices of KV groups, `[G]`, int64.
        channels: Indices of FFN channels, or of routed experts, `[F]`, int64.
    """

    groups: Tensor
    channels: Tensor

    def inverse(self) -> LayerOrder:
        """The order that undoes this one."""
        return LayerOrder(self.groups.argsort(), self.channels.argsort())


@torch.inference_mode()
def rank(
    model: PreTrainedModel,
    statistics: Iterable[LayerStatistics],
    importance: str = "obs",
    fisher: Fisher | None = None,
) -> list[LayerOrder]:
    """Order every layer's KV groups and FFN channels by importance.

    Args:
        model: The dense model.
        statistics: Statistics of each layer, first layer first (`statistics.calibrated`).
        importance: Key of `ORDERS`.
        fisher: Result of `fisher.output_fisher`; None weights all errors of an output equally.

    Returns:
        One `LayerOrder` per layer.

    Raises:
        UserError: The importance is unknown.
    """
    roots = roots_of(fisher, len(decoder_layers(model)), model.device)
    return [
        rank_layer(model, index, inputs, importance, root)
        for index, (inputs, root) in enumerate(zip(statistics, roots, strict=True))
    ]


@torch.inference_mode()
def rank_layer(
    model: PreTrainedModel,
    index: int,
    inputs: LayerStatistics,
    importance: str = "obs",
    roots: tuple[Tensor | None, Tensor | None] = (None, None),
) -> LayerOrder:
    """Order a layer's KV groups and FFN channels by importance.

    Args:
        model: The dense model.
        index: Index of the layer.
        inputs: Statistics of the layer.
        importance: Key of `ORDERS`.
        roots: R of the outputs of its attention and its FFN (`fisher.roots_of`).

    Returns:
        The order.

    Raises:
        UserError: The importance is unknown.
    """
    if importance not in ORDERS:
        raise UserError(f"Unknown importance {importance!r}.", f"Choose one of: {', '.join(ORDERS)}.")
    architecture, shape, layer = architecture_of(model.config), shape_of(model.config), decoder_layers(model)[index]
    parts = (
        (architecture.attention_output, inputs.attention, shape.queries_per_group * shape.head_dim),
        (architecture.ffn_output, inputs.ffn, 1),
    )
    return LayerOrder(
        *(
            ORDERS[importance](linear(layer, path).weight.to(model.device).float(), moments, unit, root)
            for (path, moments, unit), root in zip(parts, roots, strict=True)
        )
    )
