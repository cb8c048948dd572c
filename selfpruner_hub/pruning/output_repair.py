"""The first repair: a least-squares fit of output projections to calibration statistics, in closed form.

It is prepared before the weights are put into order (`ordering.ordered`), while the statistics of a layer are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.fisher import Fisher, roots_of
from selfpruner_hub.calibration.ridge import as_seen, damped_factor
from selfpruner_hub.calibration.statistics import LayerStatistics, Moments
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear, shape_of, unit_rows
from selfpruner_hub.models.devices import ieee_products
from selfpruner_hub.pruning.importance import LayerOrder, expand
from selfpruner_hub.storage.offload import MEMORY, TensorStore


class Repair:
    """The repaired weights of one projection for every prefix of its columns, from one Cholesky factor.

    Columns are in order of importance, H = L Lᵀ; the subscript K marks the kept prefix, the subscript R the removed
    columns. The least-squares weight W*_K = W_K + W_R H_RK H_KK⁻¹ equals W_K + W_R L_RK · L_KK⁻¹, because the factor of
    H_KK is the leading block of L. So each width takes one triangular solve. The error E‖W x - W*_K x_K‖² (ridge
    included) is the sum of the squared norms of the removed columns of W L, so the error curve needs no further solve.

    Args:
        index: Index of the layer, whose owner among several processes has the factor.
        module: The projection; its columns must be in order for `weight`.
        norms: Squared norms of the columns of R W L, `[in]`.
        factor: L, `[in, in]`; None in a process that does not own the layer.
    """

    def __init__(self, index: int, module: nn.Linear, norms: Tensor, factor: Tensor | None = None) -> None:
        self._index, self._module, self.norms, self._factor = index, module, norms, factor

    @classmethod
    @ieee_products()
    def of(
        cls,
        index: int,
        module: nn.Linear,
        moments: Moments,
        columns: Tensor,
        store: TensorStore = MEMORY,
        root: Tensor | None = None,
    ) -> Repair:
        """Factor the moments of a projection whose columns are still in dense order.

        Args:
            index: Index of the layer.
            module: The projection.
            moments: Moments of its input, in dense order, on the device that repairs.
            columns: Order of the columns, `[in]`.
            store: Store for the factor.
            root: R of the Fisher information, `[out, out]` (`fisher.output_fisher`): errors are ‖R (W x - W*_K x_K)‖².
                The repaired weights do not depend on it; None weights all errors equally.

        Returns:
            The repair.

        Raises:
            ModelError: `damped_factor` fails.
        """
        factor = damped_factor(moments.gram[columns][:, columns], moments.ridge)
        # W L itself is not kept: that would take half as much memory as the factors.
        weight = module.weight.detach().to(factor.device)[:, columns]
        return cls(index, module, (as_seen(weight, root) @ factor).square().sum(0), store(factor))

    def weight(self, width: int) -> Tensor:
        """Least-squares weight of the first `width` columns, `[out, width]`, with dtype and device of the original."""
        return ranks.from_owner(self._index, partial(self._solved, width), self._module.weight[:, :width])

    @ieee_products()
    def _solved(self, width: int) -> Tensor:
        if self._factor is None:
            raise ValueError("only the owner of a layer has its factor")
        weight, device = self._module.weight.detach(), self.norms.device
        dense, factor = weight.to(device), self._factor.to(device)
        # A copy, because the last bits of a product depend on memory alignment, which differs for loaded weights.
        lost = dense[:, width:].to(torch.float32, copy=True) @ factor[width:, :width]
        moved = torch.linalg.solve_triangular(factor[:width, :width], lost, upper=False, left=False)
        repaired = (dense[:, :width].float() + moved).to(dense.dtype)
        return repaired.contiguous().to(weight.device)  # from column-major memory, slow in a linear layer

    def errors(self) -> Tensor:
        """E‖R (W x - W*_K x_K)‖² of kept prefixes of 0, 1, …, `in` columns, `[in + 1]`, float64, never increasing."""
        norms = self.norms.cpu().double()  # a sum along a row is in no fixed order on CUDA, and plans depend on it
        return torch.cat([norms.flip(0).cumsum(0).flip(0), norms.new_zeros(1)])


LayerRepairs = tuple[Repair, Repair]
"""Repairs of the output projections of a layer's attention and FFN."""


@torch.no_grad()
def repair_layer(
    model: PreTrainedModel,
    index: int,
    order: LayerOrder,
    statistics: LayerStatistics,
    roots: tuple[Tensor | None, Tensor | None] = (None, None),
    store: TensorStore = MEMORY,
) -> LayerRepairs:
    """Prepare the first repair of one layer; the arguments are those of `first_repairs`, of this layer alone."""
    queries = expand(order.groups, unit_rows(shape_of(model.config), "query"))
    attention, ffn = output_projections(model, index)
    return (
        Repair.of(index, attention, statistics.attention, queries, store, roots[0]),
        Repair.of(index, ffn, statistics.ffn, order.channels, store, roots[1]),
    )


def output_projections(model: PreTrainedModel, index: int) -> tuple[nn.Linear, nn.Linear]:
    """The output projections of a layer's attention and FFN."""
    architecture, layer = architecture_of(model.config), decoder_layers(model)[index]
    return linear(layer, architecture.attention_output), linear(layer, architecture.ffn_output)


def first_repairs(
    model: PreTrainedModel,
    order: Sequence[LayerOrder],
    statistics: Iterable[LayerStatistics],
    fisher: Fisher | None = None,
    store: TensorStore = MEMORY,
) -> list[LayerRepairs]:
    """Prepare the first repair of every layer, before the weights are put into order.

    Args:
        model: The dense model.
        order: Order of importance of each layer (`importance.rank`).
        statistics: Statistics of each layer (`statistics.calibrate`).
        fisher: Result of `fisher.output_fisher`, for the errors; None weights all errors of an output equally.
        store: Store for the Cholesky factors.

    Returns:
        The repairs of each layer.

    Raises:
        ModelError: The statistics are degenerate.
    """
    roots = roots_of(fisher, len(order), model.device)
    layers = enumerate(zip(order, statistics, roots, strict=True))
    return [repair_layer(model, index, by, moments, root, store) for index, (by, moments, root) in layers]
