"""The first repair, in closed form: output projections by least squares on the calibration statistics, no training."""

from __future__ import annotations

import torch
from torch import Tensor

from selfpruner_hub.errors import ModelError
from selfpruner_hub.storage.offload import Keep, in_memory

RIDGE = 0.01
"""λ where there is no text to choose it on: the ridge is λ · mean(diag H) · I, with H = E[x xᵀ]."""
RIDGES = (0.001, 0.01, 0.1, 1.0)
"""λ to choose from."""
STRONGEST = 1.0


def damped_factor(gram: Tensor, ridge: float, unit: Tensor | None = None) -> Tensor:
    """The lower Cholesky factor of H + λ · mean(diag H) · I.

    Args:
        gram: H, `[D, D]`; left as it is.
        ridge: λ, at least 0; where it is lost in the rounding of H, ten times more, up to `STRONGEST`.
        unit: In place of mean(diag H), where H is a block of a matrix whose λ it is; a scalar.

    Returns:
        L, `[D, D]`, float32.

    Raises:
        ModelError: The sum is not positive definite all the same (the activations are degenerate or not finite).
    """
    mean = gram.diagonal().float().mean() if unit is None else unit
    while True:
        damped = gram.float().clone()
        damped.diagonal().add_(ridge * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed.item():
            return factor
        if ridge >= STRONGEST or not mean.isfinite():
            raise ModelError("The calibration statistics of a layer are degenerate.", "Use more calibration tokens.")
        ridge = 10 * ridge or RIDGES[0]


def as_seen(weight: Tensor, root: Tensor | None) -> Tensor:
    """R W, `[out, in]`, float32: a projection whose errors all count alike for the loss; None takes them so already."""
    return weight.float() if root is None else root @ weight.float()


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
        keep: Where the factor is put.
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
        keep: Keep = in_memory,
        root: Tensor | None = None,
    ) -> None:
        self._factor = keep(damped_factor(gram, ridge))
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


def choose_ridge(weight: Tensor, fitted: Tensor, held: Tensor) -> float:
    """Choose λ: repaired on the fitted text, at half of its columns, the projection errs least on the held-out text.

    Args:
        weight: W, `[out, in]`.
        fitted: Σ x xᵀ over the fitted tokens, `[in, in]`.
        held: The same over those held out.

    Returns:
        One of `RIDGES`.

    Raises:
        ModelError: As for `damped_factor`.
    """
    order = (fitted.diagonal() * weight.float().square().sum(0)).argsort(descending=True)
    kept, gone = order.tensor_split([max(1, len(order) // 2)])
    lost, unit = weight[:, gone].detach().float(), fitted.diagonal().mean()
    gram, cross = fitted[kept][:, kept], lost @ fitted[gone][:, kept]
    held_gram, held_cross = held[kept][:, kept], lost @ held[gone][:, kept]

    def error(ridge: float) -> float:
        """Σ ‖lost x_gone - moved x_kept‖² over the held-out text, but for what does not depend on λ."""
        moved = torch.cholesky_solve(cross.t(), damped_factor(gram, ridge, unit)).t()
        return ((moved @ held_gram - 2 * held_cross) * moved).sum(dtype=torch.float64).item()

    return min(RIDGES, key=error)
