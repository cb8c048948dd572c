"""The first repair: a least-squares fit of output projections to calibration statistics, in closed form."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner_hub.calibration.ridge import RIDGE, as_seen, damped_factor
from selfpruner_hub.models.devices import ieee_products
from selfpruner_hub.storage.offload import MEMORY, TensorStore


class Repair:
    """The repaired weights of one projection for every prefix of its columns, from one Cholesky factor.

    Columns are in order of importance, H = L Lᵀ; the subscript K marks the kept prefix, the subscript R the removed
    columns. The least-squares weight W*_K = W_K + W_R H_RK H_KK⁻¹ equals W_K + W_R L_RK · L_KK⁻¹, because the factor of
    H_KK is the leading block of L. So each width takes one triangular solve. The error E‖W x - W*_K x_K‖² (ridge
    included) is the sum of the squared norms of the removed columns of W L, so the error curve needs no further solve.

    Args:
        weight: W, `[out, in]`, columns in order of importance; kept by reference, so it must not change.
        gram: H = E[x xᵀ], `[in, in]`, in the same order, on the device that repairs.
        ridge: λ, at least 0.
        store: Store for the factor.
        root: R of the Fisher information, `[out, out]` (`fisher.output_fisher`): errors are ‖R (W x - W*_K x_K)‖². The
            repaired weights do not depend on it; None weights all errors equally.

    Raises:
        ModelError: `damped_factor` fails.
    """

    @ieee_products()
    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        ridge: float = RIDGE,
        store: TensorStore = MEMORY,
        root: Tensor | None = None,
    ) -> None:
        factor, self._device = damped_factor(gram, ridge), gram.device
        self._factor = store(factor)
        self._weight = weight.detach()
        # W L itself is not kept: that would take half as much memory as the factors.
        self._norms = (as_seen(self._weight.to(self._device), root) @ factor).square().sum(0)

    @ieee_products()
    def weight(self, width: int) -> Tensor:
        """Least-squares weight of the first `width` columns, `[out, width]`, with dtype and device of the original."""
        dense, factor = self._weight.to(self._device), self._factor.to(self._device)
        # A copy, because the last bits of a product depend on memory alignment, which differs for loaded weights.
        lost = dense[:, width:].to(torch.float32, copy=True) @ factor[width:, :width]
        moved = torch.linalg.solve_triangular(factor[:width, :width], lost, upper=False, left=False)
        repaired = (dense[:, :width].float() + moved).to(dense.dtype)
        return repaired.contiguous().to(self._weight.device)  # from column-major memory, slow in a linear layer

    def errors(self) -> Tensor:
        """E‖R (W x - W*_K x_K)‖² for a kept prefix of 0, 1, …, `in` columns, `[in + 1]`; it never increases."""
        return torch.cat([self._norms.flip(0).cumsum(0).flip(0), self._norms.new_zeros(1)])
