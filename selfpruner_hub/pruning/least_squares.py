"""Least squares of one projection over streamed tokens: what the second repair solves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from selfpruner_hub.calibration.ridge import as_seen, damped_factor, held_out

T = TypeVar("T")
ITERATIONS = 2
"""Most steps of conjugate gradients for gate and up."""
DAMPING = 0.1
"""Of each factor of their preconditioner, in units of its mean diagonal."""


class LinearFit:
    """Fits W in t = W x; λ is chosen on windows that are held out, and not fitted after.

    The next layer holds the same windows out: had this one been fitted to them, they would look better there than text
    that no layer was fitted to, and λ would come out too small.

    Args:
        module: The projection; its bias stays as it is.
        ridges: λ to choose from, smallest first, in units of mean(diag E[x xᵀ]). One alone is taken, and every window
            fitted.
        root: R, `[out, out]`: λ is that of least ‖R (t - W x)‖² (`fisher.output_fisher`). The fit itself does not
            depend on it; None takes all errors alike.
    """

    def __init__(self, module: nn.Linear, ridges: Sequence[float], root: Tensor | None = None) -> None:
        self._module, self._ridges, self._root = module, ridges, root
        self._fitted, self._held = _Sums(module), _Sums(module)
        self._windows = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        """Take windows `[N, W, in]` and what should come of them, `[N, W, out]`."""
        held = held_out(self._windows, len(x)).to(x.device) & (len(self._ridges) > 1)
        self._windows += len(x)
        self._fitted.add(x[~held], target[~held])
        self._held.add(x[held], target[held])

    def apply(self) -> None:
        """Give the projection the weight that fits."""
        before = self._module.weight
        weights = (self._fitted.solve(before, ridge) for ridge in reversed(self._ridges))  # the strongest first
        if self._held.count:
            before.copy_(first_minimum(weights, lambda weight: self._held.error(weight, self._root)))
        else:
            before.copy_(next(weights))


def first_minimum(candidates: Iterable[T], error: Callable[[T], float]) -> T:
    """Go through candidates for as long as the error falls; where it ends.

    Of all candidates the best, where the error falls and then rises, for a few of its evaluations. There is at least
    one candidate; two are held at a time.
    """
    rest = iter(candidates)
    best = next(rest)
    least = error(best)
    for candidate in rest:
        reached = error(candidate)
        if not reached < least:
            break
        best, least = candidate, reached
    return best


class _Sums:
    """E[x xᵀ] and E[t xᵀ], as sums over tokens."""

    def __init__(self, module: nn.Linear) -> None:
        outputs, inputs = module.weight.shape
        self._bias = module.bias
        self.count = 0
        self._gram = torch.zeros(inputs, inputs, device=module.weight.device)
        self._cross = torch.zeros(outputs, inputs, device=module.weight.device)

    def add(self, x: Tensor, target: Tensor) -> None:
        x, target = x.flatten(0, -2).float(), target.flatten(0, -2).float()
        if self._bias is not None:
            target = target - self._bias.float()
        self.count += len(x)
        self._gram.addmm_(x.t(), x)
        self._cross.addmm_(target.t(), x)

    def solve(self, before: Tensor, ridge: float) -> Tensor:
        """(E[t xᵀ] + λ W) (E[x xᵀ] + λ I)⁻¹."""
        gram, cross = self._gram / self.count, self._cross / self.count
        damping = ridge * gram.diagonal().mean()
        return torch.cholesky_solve((cross + damping * before.float()).t(), damped_factor(gram, ridge)).t()

    def error(self, weight: Tensor, root: Tensor | None) -> float:
        """E‖R (t - W x)‖², but for E‖R t‖²."""
        weight, cross = as_seen(weight, root), as_seen(self._cross, root)
        products = (weight @ self._gram) * weight - 2 * weight * cross
        return products.sum(dtype=torch.float64).item() / self.count


class Gated(NamedTuple):
    """Some windows of the stream, around the weights that an FFN has: its output moves by D Σ_k f_k ∘ (V_k h).

    V_k is the change of its k-th input projection: gate and up.
    """

    h: Tensor
    """What the input projections read, `[N, W, H]`."""
    factors: Tensor
    """f, the derivative of down's input by what they give, `[N, W, K, F]`. For up it is the activated gate."""
    rest: Tensor
    """What is missing in the output, `[N, W, H]`."""


def fit_inputs(stream: Callable[[], Iterable[Gated]], inputs: Tensor, down: Tensor) -> Tensor:
    """Find the change of gate and up that brings an FFN's output nearest to its target: a Gauss-Newton step.

    min E‖rest - D Σ_k f_k ∘ (V_k h)‖² is linear least squares, exact for up and to first order for gate. Its matrix is
    too great to be built, so a few steps of conjugate gradients go through the stream, preconditioned by
    (DᵀD ∘ E[f_k f_kᵀ]) ⊗ E[h hᵀ] (as in K-FAC, arXiv 1503.05671). They end where the error on windows that are held
    out ends to fall: early stopping, which is a ridge of its own. Products are taken in the dtype of the stream, and
    summed in float32.

    Args:
        stream: Goes through all windows, once a call.
        inputs: The weights of gate and up, `[K, F, H]`.
        down: D, `[H, F]`.

    Returns:
        V, `[K, F, H]`, float32; 0 where no step helps, or no window is held out.
    """
    start = torch.zeros_like(inputs, dtype=torch.float32)
    gates = start.new_zeros(len(start), start.shape[1], start.shape[1])
    read = start.new_zeros(start.shape[2], start.shape[2])
    gradients = _Pair(start)
    for h, factors, rest in stream():
        gradients.add((rest @ down).unsqueeze(-2) * factors, h)
        for gate, factor in zip(gates, factors.flatten(0, 1).unbind(1), strict=True):
            gate += (factor.t() @ factor.contiguous()).float()
        read += (h.flatten(0, 1).t() @ h.flatten(0, 1)).float()
    fitted, held = gradients.sums
    if not held.any():
        return start
    squares = down.float().t() @ down.float()
    left = torch.stack([damped_factor(gate * squares, DAMPING) for gate in gates])
    right = damped_factor(read, DAMPING)
    best, change, error = start, start.clone(), 0.0
    curved = start.clone()  # the held-out windows' matrix times the change
    preconditioned = _solved(fitted, left, right)
    direction, norm = preconditioned.clone(), (fitted * preconditioned).sum()
    for _ in range(ITERATIONS):
        products, rounded = _Pair(start), direction.to(inputs.dtype).flatten(0, 1)
        for h, factors, _rest in stream():
            moved = ((h @ rounded.t()).view_as(factors) * factors).sum(-2) @ down.t()
            products.add((moved @ down).unsqueeze(-2) * factors, h)
        step = norm / (direction * products.sums[0]).sum()
        change = change + step * direction
        curved += step * products.sums[1]
        reached = (change * (curved - 2 * held)).sum().item()
        if not reached < error:
            break
        best, error = change, reached
        fitted = fitted - step * products.sums[0]
        preconditioned = _solved(fitted, left, right)
        before, norm = norm, (fitted * preconditioned).sum()
        direction = preconditioned + norm / before * direction
    return best


class _Pair:
    """Σ y hᵀ over the tokens of the windows to fit, and of those that are held out."""

    def __init__(self, start: Tensor) -> None:
        self.sums = (torch.zeros_like(start), torch.zeros_like(start))
        self._windows = 0

    def add(self, y: Tensor, h: Tensor) -> None:
        """Take y, `[N, W, K, F]`, and h, `[N, W, H]`."""
        held = held_out(self._windows, len(h)).to(h.device)
        self._windows += len(held)
        for total, rows in zip(self.sums, (~held, held), strict=True):
            total += (y[rows].flatten(2).flatten(0, 1).t() @ h[rows].flatten(0, 1)).float().view_as(total)


def _solved(gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
    halfway = torch.cholesky_solve(gradient, left)  # [K, F, H]
    return torch.cholesky_solve(halfway.mT, right.expand(len(left), -1, -1)).mT
