"""Least-squares fits of projections over streamed tokens, for the second repair."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from selfpruner_hub import ranks
from selfpruner_hub.calibration.ridge import as_seen, damped_factor, split_held_out
from selfpruner_hub.calibration.sums import add_gram, add_product
from selfpruner_hub.models.devices import ieee_products, summed
from selfpruner_hub.models.placement import to_device
from selfpruner_hub.pruning.conjugate_gradients import PRECONDITIONER_DAMPING, descended
from selfpruner_hub.storage.offload import MEMORY, TensorStore

_T = TypeVar("_T")
ITERATIONS = 2
"""Maximum number of steps of conjugate gradients for gate_proj and up_proj. A third one is a fifth of the work of the
second repair, and lowers the KL by 1 to 2 %."""
GATE_STRIDE = 4
"""One token in this many is read for E[f_k f_kᵀ], which only preconditions: a sample is enough."""


class LinearFit:
    """Fits W in t = W x; λ is chosen on held-out windows, which are never fitted.

    All layers hold out the same windows. If one layer were fitted to them, the next layer's error on them would be
    lower than on text that no layer was fitted to, and its λ would be too small.

    Args:
        module: The projection; its bias does not change.
        ridges: Candidates for λ, smallest first, in units of mean(diag E[x xᵀ]). A single one is used without a choice,
            and then every window is fitted.
        root: R, `[out, out]`, of the Fisher information (`fisher.output_fisher`): λ minimises ‖R (t - W x)‖². For one
            λ, the fit does not depend on R. None weights all errors equally.
        store: Store for the sums while λ is sought.
    """

    def __init__(
        self,
        module: nn.Linear,
        ridges: Sequence[float],
        root: Tensor | None = None,
        store: TensorStore = MEMORY,
    ) -> None:
        self._module, self._ridges, self._root, self._store = module, ridges, root, store
        self._fitted, self._held = _Sums(module), _Sums(module)
        self._windows = 0

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add windows of inputs, `[N, W, in]`, and their target outputs, `[N, W, out]`."""
        for rows, held in split_held_out(self._windows, len(x)):
            sums = self._held if held and len(self._ridges) > 1 else self._fitted
            sums.add(x[rows], target[rows])
        self._windows += len(x)

    @ieee_products()
    def apply(self, start: int | None = None) -> int:
        """Write the fitted weight into the projection.

        Args:
            start: Index of the λ from which the least error is sought; None starts in the middle. That of the same
                projection in the layer before is near.

        Returns:
            Index of the λ that was taken.
        """
        for sums in (self._fitted, self._held):
            sums.add_up(self._store)
        weight = self._module.weight
        fitted = self._fitted.solver(weight)
        if not self._held.count:
            start = len(self._ridges) - 1
            weight.copy_(fitted(self._ridges[start]))
            return start
        start = len(self._ridges) // 2 if start is None else start
        index, best = nearest_minimum(
            lambda index: fitted(self._ridges[index]), len(self._ridges), self._held.errors(self._root), start
        )
        weight.copy_(best)
        return index


def nearest_minimum(
    candidate: Callable[[int], _T], count: int, error: Callable[[_T], float], start: int
) -> tuple[int, _T]:
    """Walk from a candidate to its neighbours while the error falls: down, or where the first such step fails, up.

    If the error falls and then rises over all candidates, the result is the best of them. Two are in memory at a time.

    Args:
        candidate: Function that makes the candidate of an index.
        count: Number of candidates.
        error: Error of a candidate.
        start: Index to start from, in [0, count).

    Returns:
        Index and candidate where the walk ends.
    """
    index, best = start, candidate(start)
    lowest = error(best)
    lowest = math.inf if math.isnan(lowest) else lowest
    for step in (-1, 1):
        while 0 <= index + step < count:
            neighbour = candidate(index + step)
            value = error(neighbour)
            if not value < lowest:
                break
            index, best, lowest = index + step, neighbour, value
        if index != start:
            break
    return index, best


class _Sums:
    """Sums of x xᵀ and t xᵀ over tokens."""

    def __init__(self, module: nn.Linear) -> None:
        outputs, inputs = module.weight.shape
        self._bias = module.bias
        self.count = 0
        where: Any = {"dtype": torch.float32, "device": module.weight.device}
        self._gram, self._cross = torch.zeros(inputs, inputs, **where), torch.zeros(outputs, inputs, **where)

    def add(self, x: Tensor, target: Tensor) -> None:
        x, target = x.flatten(0, -2), target.flatten(0, -2)
        if self._bias is not None:
            target = target.float() - self._bias.float()
        self.count += len(x)
        add_gram(self._gram, x)
        add_product(self._cross, target, x)

    def add_up(self, store: TensorStore) -> None:
        """Add what the other processes summed, divide by the number of tokens, and keep E[x xᵀ] in a store."""
        ranks.total(self._gram, self._cross)
        self.count = round(ranks.added(self.count))
        self._cross.div_(max(1, self.count))
        self._gram = store(self._gram.div_(max(1, self.count)))

    def solver(self, before: Tensor) -> Callable[[float], Tensor]:
        """Make the function λ → W + (E[t xᵀ] - W E[x xᵀ]) (E[x xᵀ] + λ I)⁻¹.

        That is (E[t xᵀ] + λ W) (E[x xᵀ] + λ I)⁻¹, also for the larger λ that a factor may need.
        """
        weight = before.float()
        rest = self._cross - weight @ to_device(self._gram, before.device)

        def solve(ridge: float) -> Tensor:
            factor = damped_factor(to_device(self._gram, before.device), ridge)
            return weight + torch.cholesky_solve(rest.t(), factor).t()

        return solve

    def errors(self, root: Tensor | None) -> Callable[[Tensor], float]:
        """Make the function W → E‖R (t - W x)‖² without the constant term E‖R t‖²."""
        cross = as_seen(self._cross, root)

        def error(weight: Tensor) -> float:
            seen = as_seen(weight, root)
            return summed((seen @ to_device(self._gram, weight.device)).sub_(cross, alpha=2).mul_(seen))

        return error


class Gated(NamedTuple):
    """An FFN linearised around its current weights, on some windows: its output changes by D Σ_k f_k ∘ (V_k h).

    V_k is the change of its k-th input projection (gate_proj, up_proj).
    """

    h: Tensor
    """Input of gate_proj and up_proj, `[N, W, H]`."""
    factors: Tensor
    """f, the derivative of down_proj's input with respect to the outputs of gate_proj and up_proj, `[N, W, K, F]`. For
    up_proj it is the activated gate."""
    rest: Tensor
    """Residual: target minus output, times R where errors are loss-weighted, `[N, W, H]`."""


@ieee_products()
def fit_inputs(
    stream: Callable[[], Iterable[Gated]], sizes: torch.Size, down: Tensor, store: TensorStore = MEMORY
) -> Tensor:
    """Find the change of gate_proj and up_proj that best moves an FFN's output to its target: a Gauss-Newton step.

    min E‖rest - D Σ_k f_k ∘ (V_k h)‖² is linear least squares, exact for up_proj and of first order for gate_proj. Its
    matrix is too large to build, so a few steps of conjugate gradients read the stream instead, preconditioned by
    (DᵀD ∘ E[f_k f_kᵀ]) ⊗ E[h hᵀ] (as in K-FAC, arXiv 1503.05671). They stop when the error on held-out windows stops
    falling; early stopping acts as a ridge. Products are computed in the dtype of the stream and summed in float32.

    Args:
        stream: Function that iterates over all windows, once per call.
        sizes: K, F and H, the sizes of the weights of gate_proj and up_proj.
        down: D, the weight of down_proj, times R where errors are loss-weighted, `[H, F]`, in the dtype of products.
        store: Store for what rests between two steps.

    Returns:
        V, `[K, F, H]`, float32; 0 if no step lowers the held-out error, or no window is held out.
    """
    device = down.device
    gradients, gates, read = _gathered(stream, sizes, down, store)
    if not gradients[1].any():
        return torch.zeros(sizes, dtype=torch.float32, device=device)
    right = damped_factor(read, PRECONDITIONER_DAMPING)

    def left_factor(gate: Tensor) -> Tensor:
        gate = to_device(gate, device).mul_(down.float().t() @ down.float())
        return store(damped_factor(gate, PRECONDITIONER_DAMPING))

    left = [left_factor(gates.pop(0)) for _ in range(len(gates))]

    def products(direction: Tensor) -> tuple[Tensor, Tensor]:
        pair, rounded = _Pair(sizes, device), direction.to(down.dtype)
        for h, factors, _rest in stream():
            changes = ((h @ v.t()).mul_(f) for v, f in zip(rounded, factors.unbind(-2), strict=True))
            pair.add(reduce(Tensor.add_, changes) @ down.t() @ down, factors, h)
            del h, factors, changes  # before the next ones are computed
        ranks.total(*pair.sums)
        return pair.sums

    def solved(gradient: Tensor) -> Tensor:
        solution = torch.empty(sizes, dtype=torch.float32, device=device)
        for each, some, factor in zip(solution, gradient, left, strict=True):
            halfway = torch.cholesky_solve(to_device(some, device), to_device(factor, device))  # [F, H]
            each.copy_(torch.cholesky_solve(halfway.t(), right).t())
        return solution

    return descended(gradients, products, solved, ITERATIONS, store=store)


def _gathered(
    stream: Callable[[], Iterable[Gated]], sizes: torch.Size, down: Tensor, store: TensorStore
) -> tuple[tuple[Tensor, Tensor], list[Tensor], Tensor]:
    """The gradients on fitted and on held-out windows, E[f_k f_kᵀ] of each k, both in the store, and E[h hᵀ].

    The stream is read twice, because a device may have no room for all of them.
    """
    count, channels, hidden = sizes
    where: Any = {"dtype": torch.float32, "device": down.device}
    read = torch.zeros(hidden, hidden, **where)
    pair = _Pair(sizes, down.device)
    for h, factors, rest in stream():
        pair.add(rest @ down, factors, h)
        add_gram(read, h.flatten(0, 1))
    ranks.total(*pair.sums, read)
    fitted, held = (store(each) for each in pair.sums)
    del pair
    gates = [torch.zeros(channels, channels, **where) for _ in range(count)]
    for _h, factors, _rest in stream():
        for gate, factor in zip(gates, factors.flatten(0, 1)[::GATE_STRIDE].unbind(1), strict=True):
            add_gram(gate, factor)
    ranks.total(*gates)
    return (fitted, held), [store(each) for each in gates], read


class _Pair:
    """Σ (f_k ∘ y) hᵀ over tokens, `[K, F, H]`, separately for fitted and held-out windows."""

    def __init__(self, sizes: torch.Size, device: torch.device) -> None:
        fitted, held = (torch.zeros(sizes, dtype=torch.float32, device=device) for _ in range(2))
        self.sums = (fitted, held)
        self._windows = 0

    def add(self, y: Tensor, factors: Tensor, h: Tensor) -> None:
        """Add y, `[N, W, F]`, f, `[N, W, K, F]`, and h, `[N, W, H]`."""
        for rows, held in split_held_out(self._windows, len(h)):
            for total, factor in zip(self.sums[held], factors[rows].unbind(-2), strict=True):
                add_product(total, (y[rows] * factor).flatten(0, 1), h[rows].flatten(0, 1))
        self._windows += len(h)
