"""The first repair, in closed form: output projections by least squares on the calibration statistics, no training."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner_hub.calibration.ridge import RIDGE, as_seen, damped_factor
from selfpruner_hub.storage.offload import MEMORY, TensorStore


class Repair:
    """The repaired weights of one projection for every prefix of its columns, from one Cholesky factor.

    With columns in order of importance, H = L Lᵀ and a kept prefix K, the least-squares weight
    W*_K = W_K + W_R H_RK H_KK⁻¹ equals W_K + W_R L_RK · L_KK⁻¹, since the factor of H_KK is the leading block of L: one
    triangular solve a width. The error of what is removed, E‖W x - W*_K x_K‖² (ridge included), is the sum of the
    squared norms of the remaining columns of W L, so the whole error curve costs nothing more.

    Args:
        weight: W, `[out, in]`, columns in order of importance; kept by reference, and must stay as it is.
        gram: H = E[x xᵀ], `[in, in]`, in the same order.
        ridge: λ, at least 0.
        store: Where the factor is put.
        root: R, `[out, out]`: errors are ‖R (W x - W*_K x_K)‖² (`fisher.output_fisher`). The weights do not depend
            on it; None takes all errors alike.

    Raises:
        ModelError: As for `damped_factor`.
    """

    def __init__(
        self,
        weight: Tensor,
        gram: Tensor,
        ridge: float = RIDGE,
        store: TensorStore = MEMORY,
        root: Tensor | None = None,
    ) -> None:
        self._factor = store(damped_factor(gram, ridge))
        self._weight = weight.detach()
        # W L itself is not kept: it would take half as much memory as all factors do.
        self._norms = (as_seen(self._weight, root) @ self._factor).square().sum(0)

    def weight(self, kept: int) -> Tensor:
        """Least-squares weight of the first `kept` columns, `[out, kept]`, in the dtype of the original."""
        # A copy, since the last bits of a product depend on where its factors lie, and loaded weights lie anywhere.
        lost = self._weight[:, kept:].to(torch.float32, copy=True) @ self._factor[kept:, :kept]
        moved = torch.linalg.solve_triangular(self._factor[:kept, :kept], lost, upper=False, left=False)
        repaired = self._weight[:, :kept].float() + moved
        return repaired.to(self._weight.dtype).contiguous()  # the solver returns columns, slow in a linear layer

    def errors(self) -> Tensor:
        """E‖R (W x - W*_K x_K)‖² for a prefix of 0, 1, …, `in` columns, `[in + 1]`, never increasing."""
        return torch.cat([self._norms.flip(0).cumsum(0).flip(0), self._norms.new_zeros(1)])
