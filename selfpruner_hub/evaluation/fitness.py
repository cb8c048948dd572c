"""Plan → score: a candidate is run by putting its sliced layers into the dense model, which lends everything else."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.metrics import divergence, label_loss, perplexity, teach, teacher_loss
from selfpruner_hub.evaluation.prefix_cache import Boundaries
from selfpruner_hub.evaluation.sensitivity import slopes
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, Slopes, loss_alone
from selfpruner_hub.pruning.slicing import Slicer

METRICS = ("kl", "perplexity")
BOUNDARY_MEMORY = 0.5
"""Memory for hidden states of earlier candidates on as many windows, as a multiple of the dense model's weights."""
REMAINS = 0.3
"""How much counts, before a second repair, of the loss that the layers' errors add to one another: the repair fits each
layer to the stream that the others have moved. Up to 0.7 put four plans of one model at one rate into the order in
which they ended, 1 did not (`benchmarks/excess.py`)."""


class Fitness:
    """Scores plans on held-out calibration windows; lower is better.

    A candidate has its first repair alone, in which the errors of the layers add to one another: its loss is more than
    the sum of what each costs alone. Where a second repair follows, part of that excess goes. A search that minimised
    it as it stands would pay for it with losses that stay, so it counts `remains` times only.

    Args:
        slicer: Cuts the candidates.
        windows: Token ids, `[N, W]`; never those that results are reported on.
        metric: `"perplexity"` (the paper), or `"kl"` to the dense model's top-k next-token distribution, which needs no
            labels. Týr-the-Pruner (NeurIPS 2025, table 5) found that it guards accuracy better; here plans on which
            the two disagree are equally accurate (`benchmarks/fitness.py`).
        curves: Predicted losses of the layers alone, for `remains` and for the second order of `slopes`.
        remains: How much of the loss in excess of their sum counts, in [0, 1]: all of it, or `REMAINS` where a second
            repair follows. Scores then order plans for it, but are no measurement: the curves were predicted on another
            text. Below 1 it needs curves.

    Raises:
        UserError: The metric is unknown.
        ValueError: There are no curves where they are needed.
    """

    def __init__(
        self,
        slicer: Slicer,
        windows: Tensor,
        metric: str = "kl",
        curves: Sequence[LossCurves] | None = None,
        remains: float = 1.0,
    ) -> None:
        if metric not in METRICS:
            raise UserError(f"Unknown fitness {metric!r}.", f"Choose one of: {', '.join(METRICS)}.")
        if remains < 1 and curves is None:
            raise ValueError("without curves, nothing tells how much is in excess")
        self._slicer = slicer
        self._windows = windows
        self._curves = curves
        self._remains = remains
        self._dense_perplexities: dict[int, float] = {}  # by the number of windows
        self.metric = metric
        self._teacher = teach(slicer.model, windows) if metric == "kl" else None
        # A model in files does not fit in memory, so hidden states may not take half of it.
        self._boundaries = Boundaries(0 if slicer.store.on_disk else BOUNDARY_MEMORY * self.nbytes)
        self._token_size = slicer.shape.hidden_size * slicer.model.dtype.itemsize

    @property
    def device(self) -> torch.device:
        """Where candidates are scored."""
        return self._slicer.model.device

    @property
    def nbytes(self) -> int:
        """Bytes of the dense model's weights."""
        return sum(p.nbytes for p in self._slicer.model.parameters())

    def __call__(self, plan: Plan, share: float = 1.0) -> float:
        """Score `plan` on the first `share` of the windows (at least one); not-a-number counts as infinity."""
        windows = self._first(share)
        start = self._boundaries.start(plan, len(windows), windows.numel() * self._token_size)
        layers = start.layers(lambda index: self._slicer.layer(index, plan.layers[index]))
        with with_layers(self._slicer.model, layers) as model:
            if self._teacher is None:
                value = perplexity(model, windows)
            else:
                value = divergence(model, windows, self._teacher)
        if not math.isfinite(value):
            value = math.inf
        elif self._remains < 1 and self._curves is not None:
            value = self._weighed(self._curves, plan, value, share)
        self._boundaries.keep(start, len(windows), value)
        return value

    def _weighed(self, curves: Sequence[LossCurves], plan: Plan, measured: float, share: float) -> float:
        """The score by which plans are ordered for the second repair."""
        alone = loss_alone(curves, plan)
        excess = self._nats(measured, share) - alone
        if self.metric == "kl":
            return alone + self._remains * excess
        return math.exp(alone + self._remains * excess) * self._perplexity(share)

    def loss(self, plan: Plan, share: float = 1.0) -> float:
        """Measure what `plan` costs over the dense model on the first `share` of the windows, in nats per token."""
        return self._nats(self(plan, share), share)

    def _nats(self, score: float, share: float) -> float:
        return score if self.metric == "kl" else math.log(score) - math.log(self._perplexity(share))

    def _perplexity(self, share: float) -> float:
        """Of the dense model."""
        windows, known = self._first(share), self._dense_perplexities
        if len(windows) not in known:
            known[len(windows)] = perplexity(self._slicer.model, windows)
        return known[len(windows)]

    def slopes(self, plan: Plan, share: float = 1.0) -> Slopes:
        """Predict on the first `share` of the windows what small changes of `plan` do to the loss."""
        windows = self._first(share)
        loss = label_loss(windows) if self._teacher is None else teacher_loss(self._teacher)
        return slopes(self._slicer, plan, windows, loss, self._curves, self._remains)

    def _first(self, share: float) -> Tensor:
        return self._windows[: max(1, round(share * len(self._windows)))]
