"""The first repair: a least-squares fit of output projections to calibration statistics, in closed form.

It is prepared before the weights are put into order (`ordering.ordered`), while the statistics of a layer are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

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
        module: The projection, with its columns still in dense order; they must be in order for `weight`.
        moments: Moments of its input, in dense order, on the device that repairs.
        columns: Order of the columns, `[in]`.
        store: Store for the factor.
        root: R of the Fisher information, `[out, out]` (`fisher.output_fisher`): errors are ‖R (W x - W*_K x_K)‖². The
            repaired weights do not depend on it; None weights all errors equally.

    Raises:
        ModelError: `damped_factor` fails.
    """

    @ieee_products()
    def __init__(
        self,
        module: nn.Linear,
        moments: Moments,
        columns: Tensor,
        store: TensorStore = MEMORY,
        root: Tensor | None = None,
    ) -> None:
        self._module, self._device = module, moments.gram.device
        factor = damped_factor(moments.gram[columns][:, columns], moments.ridge)
        self._factor = store(factor)
        # W L itself is not kept: that would take half as much memory as the factors.
        weight = module.weight.detach().to(self._device)[:, columns]
        self._norms = (as_seen(weight, root) @ factor).square().sum(0)

    @ieee_products()
    def weight(self, width: int) -> Tensor:
        """Least-squares weight of the first `width` columns, `[out, width]`, with dtype and device of the original."""
        weight = self._module.weight.detach()
        dense, factor = weight.to(self._device), self._factor.to(self._device)
        # A copy, because the last bits of a product depend on memory alignment, which differs for loaded weights.
        lost = dense[:, width:].to(torch.float32, copy=True) @ factor[width:, :width]
        moved = torch.linalg.solve_triangular(factor[:width, :width], lost, upper=False, left=False)
        repaired = (dense[:, :width].float() + moved).to(dense.dtype)
        return repaired.contiguous().to(weight.device)  # from column-major memory, slow in a linear layer

    def errors(self) -> Tensor:
        """E‖R (W x - W*_K x_K)‖² for a kept prefix of 0, 1, …, `in` columns, `[in + 1]`; it never increases."""
        return torch.cat([self._norms.flip(0).cumsum(0).flip(0), self._norms.new_zeros(1)])


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
    architecture, layer = architecture_of(model.config), decoder_layers(model)[index]
    queries = expand(order.groups, unit_rows(shape_of(model.config), "query"))
    attention = linear(layer, architecture.attention_output), statistics.attention, queries
    ffn = linear(layer, architecture.ffn_output), statistics.ffn, order.channels
    return Repair(*attention, store, roots[0]), Repair(*ffn, store, roots[1])


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
