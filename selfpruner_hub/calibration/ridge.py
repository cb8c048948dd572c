"""The ridge of least squares: its strength λ, and the windows on which λ is chosen."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.devices import ieee_products, summed

RIDGE = 0.01
"""Default λ, if there is no text to choose it on: the ridge is λ · mean(diag H) · I, with H = E[x xᵀ]."""
RIDGES = (0.001, 0.01, 0.1, 1.0)
"""Candidates for λ."""
STRONGEST = 1.0
ROUNDED = 1e-6
"""First share of its mean that is added to a diagonal whose matrix rounding has made indefinite."""
WITHOUT_INPUT = 1e-12
"""Unit of λ where H is 0: any ridge keeps the weights then, and this one adds nothing to predicted errors."""
HELD_OUT = 8
"""One window in this many is held out to choose λ; the second repair does not fit it in any layer."""


def split_held_out(first: int, count: int) -> Iterator[tuple[slice, bool]]:
    """Split the windows `first` to `first + count - 1` into runs of which all windows are held out, or none.

    Args:
        first: Number of windows before these.
        count: Number of windows.

    Yields:
        Positions of a run, from 0 to `count`, and whether it is held out: one window in `HELD_OUT` is.
    """
    start = 0
    while start < count:
        left = HELD_OUT - 1 - (first + start) % HELD_OUT  # before the next window that is held out
        end = min(start + max(left, 1), count)
        yield slice(start, end), left == 0
        start = end


def ridge_unit(gram: Tensor) -> Tensor:
    """Compute mean(diag H), the unit of λ; `WITHOUT_INPUT` where H is 0, as of a layer that was pruned by zeroing.

    Args:
        gram: H, `[D, D]`.

    Returns:
        Scalar, float32, above 0 unless H is not finite.
    """
    mean = gram.diagonal().float().mean()
    return mean.where(mean != 0, WITHOUT_INPUT)


def damped_factor(gram: Tensor, ridge: float, unit: Tensor | None = None) -> Tensor:
    """Compute the lower Cholesky factor of H + λ · mean(diag H) · I.

    Args:
        gram: H, `[D, D]`, float32; its diagonal changes while this runs, so that no copy is made.
        ridge: λ, at least 0; raised tenfold, up to `STRONGEST`, while the sum is not positive definite.
        unit: Scalar that replaces mean(diag H), if H is a block of a larger matrix and λ is in units of that matrix.

    Returns:
        L, `[D, D]`, float32.

    Raises:
        ModelError: The sum is not positive definite for any such λ (the activations are degenerate or not finite).
    """
    mean = ridge_unit(gram) if unit is None else unit
    diagonal = gram.diagonal().clone()
    while True:
        gram.diagonal().add_(ridge * mean)
        factor = _factor(gram)
        gram.diagonal().copy_(diagonal)
        if factor is not None:
            return factor
        if not mean.isfinite():
            raise ModelError("The calibration statistics of a layer are not finite.", "Load the model in float32.")
        if ridge >= STRONGEST:
            raise ModelError("The calibration statistics of a layer are degenerate.", "Use more calibration tokens.")
        ridge = 10 * ridge or RIDGES[0]


def rounded_factor(matrices: Tensor) -> Tensor:
    """Compute the lower Cholesky factors of matrices that are positive definite but for rounding.

    Args:
        matrices: `[..., D, D]`, float32; where one has no factor, all diagonals are raised by their mean times
            `ROUNDED`, then ten times as much, and so on.

    Returns:
        Factors, `[..., D, D]`.

    Raises:
        ModelError: The matrices are not finite, or far from positive definite.
    """
    factors, raised = _factor(matrices), ROUNDED
    while factors is None:
        if raised > STRONGEST:
            raise ModelError("The calibration statistics of a layer are degenerate.", "Use more calibration tokens.")
        more = raised * matrices.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
        factors = _factor(
            matrices
            + more[..., None, None] * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        )
        raised *= 10
    return factors


@ieee_products()
def _factor(matrices: Tensor) -> Tensor | None:
    """The Cholesky factors, or None where one does not exist or is not finite, which not every device reports.

    What is not finite in a row makes the diagonal of that row so.
    """
    factors, failed = torch.linalg.cholesky_ex(matrices)
    return factors if not failed.any() and factors.diagonal(dim1=-2, dim2=-1).isfinite().all() else None


def as_seen(weight: Tensor, root: Tensor | None) -> Tensor:
    """R W, `[out, in]`, float32: its squared output errors are loss-weighted (Fisher information); None means R = I."""
    return weight.float() if root is None else root @ weight.float()


@ieee_products()
def choose_ridge(weight: Tensor, fitted: Tensor, held: Tensor) -> float:
    """Choose the λ of least error on the held-out text, for a projection with half its columns, repaired on the rest.

    Args:
        weight: W, `[out, in]`.
        fitted: Σ x xᵀ over the fitted tokens, `[in, in]`.
        held: Σ x xᵀ over the held-out tokens, `[in, in]`.

    Returns:
        One of `RIDGES`.

    Raises:
        ModelError: `damped_factor` fails.
    """
    order = (fitted.diagonal() * weight.float().square().sum(0)).argsort(descending=True)
    kept, gone = order.tensor_split([max(1, len(order) // 2)])
    lost, unit = weight[:, gone].detach().float(), ridge_unit(fitted)
    gram, cross = fitted[kept][:, kept], lost @ fitted[gone][:, kept]
    held_gram, held_cross = held[kept][:, kept], lost @ held[gone][:, kept]

    def error(ridge: float) -> float:
        """Σ ‖lost x_gone - moved x_kept‖² over the held-out text, without the term that does not depend on λ."""
        moved = torch.cholesky_solve(cross.t(), damped_factor(gram, ridge, unit)).t()
        return summed((moved @ held_gram - 2 * held_cross) * moved)

    return min(RIDGES, key=error)
