"""A least-squares fit of many projections whose outputs are summed, without a matrix of all their inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from selfpruner_hub.calibration.ridge import damped_factor, split_held_out
from selfpruner_hub.calibration.sums import add_gram, add_product
from selfpruner_hub.models.devices import ieee_products
from selfpruner_hub.pruning.conjugate_gradients import PRECONDITIONER_DAMPING, descended

STEPS_TOGETHER = 12
"""Maximum number of steps of conjugate gradients."""


class Summed(NamedTuple):
    """The projections on some windows: each reads some of the tokens."""

    parts: Sequence[tuple[int, Tensor, Tensor]]
    """Index of a projection, the tokens that it reads, `[n]`, of `N · W`, and its inputs, `[n, in]`."""
    rest: Tensor
    """Residual: target minus sum of the outputs, `[N, W, H]`."""


SummedStream = Callable[[], Iterable[Summed]]
"""Function that iterates over all windows, once per call."""


@ieee_products()
def fit_together(stream: SummedStream, sizes: Sequence[int], outputs: int, root: Tensor | None = None) -> list[Tensor]:
    """Find the changes of several projections that together best move the sum of their outputs to its target.

    min E‖rest - Σ_b V_b x_b‖² by conjugate gradients, which read the stream, preconditioned by the factor of each
    projection's own Σ x_b x_bᵀ. They stop when the error on held-out windows stops falling; early stopping acts as a
    ridge.

    Args:
        stream: Function that iterates over all windows.
        sizes: Number of inputs of each projection.
        outputs: H.
        root: R of the output, which weights the held-out errors; None weights all alike.

    Returns:
        V_b of each projection, `[H, in]`, float32; 0 if no step lowers the held-out error, or no window is held out.
    """
    fit = _Fit(stream, sizes, outputs)
    gradients = fit.gradients()
    if not gradients[1].any():
        change = torch.zeros_like(gradients[0])
    else:
        change = descended(gradients, fit.products, fit.solved, STEPS_TOGETHER, root)
    return [change[:, place] for place in fit.places]


class _Fit:
    """The gradient, the products and the preconditioner of the fit; the projections stand side by side, `[H, Σ in]`."""

    def __init__(self, stream: SummedStream, sizes: Sequence[int], outputs: int) -> None:
        self._stream, self._outputs = stream, outputs
        ends = np.cumsum(sizes).tolist()
        self.places = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        self._factors: list[Tensor] = []
        for batch in stream():
            if not self._factors:
                self._factors = [batch.rest.new_zeros(size, size, dtype=torch.float32) for size in sizes]
            for block, _, x in batch.parts:
                add_gram(self._factors[block], x)
        for each in self._factors:  # in place: they are the largest matrices of the repair
            each.copy_(damped_factor(each, PRECONDITIONER_DAMPING))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Σ rest xᵀ on fitted and on held-out windows."""
        return self._sums((parts, rest.flatten(0, -2).float(), rest) for parts, rest in self._stream())

    def products(self, direction: Tensor) -> tuple[Tensor, Tensor]:
        """Σ (V x) xᵀ of a direction V on fitted and on held-out windows."""

        def moved() -> Iterator[tuple[Sequence[tuple[int, Tensor, Tensor]], Tensor, Tensor]]:
            for parts, rest in self._stream():
                y = torch.zeros_like(rest, dtype=torch.float32).flatten(0, -2)
                for block, tokens, x in parts:
                    y.index_add_(0, tokens, x.float() @ direction[:, self.places[block]].t())
                yield parts, y, rest

        return self._sums(moved())

    def _sums(
        self, batches: Iterable[tuple[Sequence[tuple[int, Tensor, Tensor]], Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Σ y xᵀ on fitted and on held-out windows, for y of each token, `[N · W, H]`."""
        device, size = self._factors[0].device, self.places[-1].stop
        fitted, held = (torch.zeros(self._outputs, size, device=device) for _ in range(2))
        windows = 0
        for parts, y, rest in batches:
            is_held = torch.zeros(rest.shape[:-1], dtype=torch.bool, device=device)
            for rows, some in split_held_out(windows, len(rest)):
                is_held[rows] = some
            windows += len(rest)
            for block, tokens, x in parts:
                chosen = is_held.flatten()[tokens]
                for total, mask in ((fitted, ~chosen), (held, chosen)):
                    add_product(total[:, self.places[block]], y[tokens[mask]], x[mask])
        return fitted, held

    def solved(self, gradient: Tensor) -> Tensor:
        """The gradient times the inverse of each projection's own matrix."""
        parts = zip(self._factors, self.places, strict=True)
        return torch.cat([torch.cholesky_solve(gradient[:, place].t(), factor).t() for factor, place in parts], 1)
