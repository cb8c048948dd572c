"""Score plans: run each candidate as the dense model with sliced layers in place of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from selfpruner_hub import ranks
from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.metrics import cross_entropy, divergence, label_loss, teach, teacher_loss
from selfpruner_hub.evaluation.sensitivity import measure_steps
from selfpruner_hub.models.forward import BATCH_TOKENS, windows_at_once
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves, StepEffects, loss_alone
from selfpruner_hub.pruning.slicing import Slicer

METRICS = ("kl", "perplexity")
REMAINS = 0.3
"""Weight of the excess, the loss beyond the sum of the layers' predicted losses, in scores before a second repair; that
repair takes part of the excess away. Values up to 0.7 ranked four plans of one model at one β as their final losses
did; 1 did not (`benchmarks/excess.py` of commit 1e390c6)."""


class Fitness:
    """Measures plans, after the first repair, on the fitness text, which the calibration has not read; lower is better.

    Args:
        slicer: Slicer that cuts the candidates.
        windows: Token ids, `[N, W]`; never those that results are reported on.
        metric: `"perplexity"` (the paper), or `"kl"`, the KL divergence from the dense model's top-k next-token
            distribution, which needs no labels. Týr-the-Pruner (NeurIPS 2025, table 5) found that `"kl"` preserves
            accuracy better.
        kv_multiple: Number of KV groups in a step of an attention, for `measure_steps`.

    Raises:
        UserError: The metric is unknown, or there are fewer windows than processes.
    """

    def __init__(self, slicer: Slicer, windows: Tensor, metric: str = "kl", kv_multiple: int = 1) -> None:
        ranks.share(len(windows))  # each process reads at least one
        if metric not in METRICS:
            raise UserError(f"Unknown fitness {metric!r}.", f"Choose one of: {', '.join(METRICS)}.")
        self._slicer = slicer
        self._count = len(windows)
        self._windows = windows[ranks.rank() :: ranks.count()]  # so that of the first ones, each process has as many
        self._known: dict[tuple[Plan, int], float] = {}  # key: plan and number of windows of all processes
        self.metric = metric
        self._kv_multiple = kv_multiple
        windows_at_once(slicer.model, windows.shape[1], BATCH_TOKENS)  # by trial, with the dense layers: the largest
        self._teacher = teach(slicer.model, self._windows) if metric == "kl" else None

    def __call__(self, plan: Plan, share: float = 1.0) -> float:
        """Score `plan` on the first `share` of the windows (at least one), once; NaN becomes infinity."""
        first, windows = self._first(share)
        key = plan, first
        if key not in self._known:
            with with_layers(self._slicer.model, self._slicer.layers(plan)) as model:
                if self._teacher is None:
                    value = math.exp(ranks.mean(cross_entropy(model, windows), len(windows)))
                else:
                    value = ranks.mean(divergence(model, windows, self._teacher), len(windows))
            self._known[key] = value if math.isfinite(value) else math.inf
        return self._known[key]

    def loss(self, plan: Plan, share: float = 1.0) -> float:
        """Measure the loss of `plan` above the dense model's on the first `share` of the windows, in nats per token."""
        return self.nats(self(plan, share), share)

    def nats(self, score: float, share: float = 1.0) -> float:
        """Convert a score on the first `share` of the windows to the loss above the dense model's in nats per token."""
        return score if self.metric == "kl" else math.log(score) - math.log(self._perplexity(share))

    def score(self, nats: float, share: float = 1.0) -> float:
        """Convert such a loss to a score; the inverse of `nats`."""
        return nats if self.metric == "kl" else math.exp(nats) * self._perplexity(share)

    def _perplexity(self, share: float) -> float:
        """Perplexity of the dense model on the first `share` of the windows."""
        return self(self._slicer.shape.dense, share)

    def measure_steps(
        self, plan: Plan, share: float = 1.0, curves: Sequence[LossCurves] | None = None, remains: float = 1.0
    ) -> StepEffects:
        """Predict the effect of small changes of a plan on the loss.

        Args:
            plan: Plan to change.
            share: Share of the windows to measure on, in (0, 1].
            curves: Predicted losses of the layers alone, for the second-order term; None leaves it out.
            remains: Weight of the loss beyond the sum of the curves, in [0, 1].

        Returns:
            The predicted changes of the mean loss per predicted token.
        """
        _, windows = self._first(share)
        loss = label_loss(windows) if self._teacher is None else teacher_loss(self._teacher)
        return measure_steps(self._slicer, plan, windows, loss, curves, remains, self._kv_multiple)

    def _first(self, share: float) -> tuple[int, Tensor]:
        """Number of the first windows, at least one for each process, and the part that this one reads."""
        first = max(ranks.count(), round(share * self._count))
        return first, self._windows[: len(range(ranks.rank(), first, ranks.count()))]


class SecondRepairScore:
    """Scores plans that will get a second repair; lower is better.

    It ranks plans but is not a measured loss, because the curves come from another text. A candidate has only its first
    repair. The errors of its layers accumulate, so its loss is larger than the sum of the layers' predicted losses; the
    difference is the excess. The second repair removes part of the excess but not the predicted losses. A search that
    counted the full excess would reduce it at the expense of losses that remain, so it is multiplied by `remains`.

    Args:
        fitness: Fitness that measures the plans.
        curves: Predicted losses of the layers alone.
        remains: Weight of the excess, in [0, 1].
    """

    def __init__(self, fitness: Fitness, curves: Sequence[LossCurves], remains: float = REMAINS) -> None:
        self._fitness, self._curves, self._remains = fitness, curves, remains

    def __call__(self, plan: Plan, share: float = 1.0) -> float:
        """Score `plan` on the first `share` of the windows (at least one)."""
        measured = self._fitness(plan, share)
        if math.isinf(measured):
            return measured
        alone = loss_alone(self._curves, plan)
        excess = self._fitness.nats(measured, share) - alone
        return self._fitness.score(alone + self._remains * excess, share)

    def loss(self, plan: Plan, share: float = 1.0) -> float:
        """Score a plan as a loss above the dense model's, in nats per token."""
        return self._fitness.nats(self(plan, share), share)

    def measure_steps(self, plan: Plan, share: float = 1.0) -> StepEffects:
        """Predict the effect of small changes of a plan on its score, in nats per token."""
        return self._fitness.measure_steps(plan, share, self._curves, self._remains)
