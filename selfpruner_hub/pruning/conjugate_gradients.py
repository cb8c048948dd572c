"""Preconditioned conjugate gradients that stop early, for least squares whose matrix is too large to build."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from selfpruner_hub.calibration.ridge import as_seen
from selfpruner_hub.models.placement import to_device
from selfpruner_hub.storage.offload import MEMORY, TensorStore

PRECONDITIONER_DAMPING = 0.1
"""Damping of each factor of the preconditioner, in units of the factor's mean diagonal."""


def descended(
    gradients: tuple[Tensor, Tensor],
    products: Callable[[Tensor], tuple[Tensor, Tensor]],
    solved: Callable[[Tensor], Tensor],
    iterations: int,
    root: Tensor | None = None,
    store: TensorStore = MEMORY,
) -> Tensor:
    """Minimise a squared error by preconditioned conjugate gradients, until that on held-out windows stops falling.

    Args:
        gradients: Gradients at 0 on fitted and on held-out windows, in the store; they are overwritten, since a few
            tensors of this size are all that an accelerator may have room for.
        products: Function that multiplies a direction by the matrices of the fitted and of the held-out windows.
        solved: Preconditioner.
        iterations: Maximum number of steps.
        root: R of the outputs, whose rows the change has: the held-out error is ‖R (rest - V x)‖²; None means R = I.
        store: Store for what the products do not need.

    Returns:
        The change, of the shape of a gradient; 0 if no step lowers the held-out error.
    """
    fitted, held = gradients
    rest = held.mul_(-2)  # the matrix of the held-out windows times the change, minus twice their gradient
    best, error = torch.zeros_like(fitted), 0.0
    direction = solved(fitted)
    device = direction.device
    norm = (to_device(fitted, device) * direction).sum()
    for iteration in range(iterations):
        of_fitted, of_held = products(direction)
        step = norm / (direction * of_fitted).sum()
        change = (step * direction).add_(to_device(best, device))
        held = to_device(rest, device).add_(of_held.mul_(step))
        del of_held
        reached = (change * held if root is None else as_seen(change, root) * as_seen(held, root)).sum().item()
        if not reached < error:
            break
        best, error = store(change), reached
        if iteration == iterations - 1:
            break
        rest.copy_(held)
        del change, held
        gradient = to_device(fitted, device).sub_(of_fitted.mul_(step))
        fitted.copy_(gradient)
        del of_fitted
        preconditioned = solved(gradient)
        before, norm = norm, (gradient * preconditioned).sum()
        direction.mul_(norm / before).add_(preconditioned)
        del gradient, preconditioned
    return to_device(best, device)
