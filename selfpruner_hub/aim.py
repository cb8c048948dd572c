"""The aim of a run: a share of the weights, or a target in a runtime whose costs are measured."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.errors import SelfPrunerError, UserError, check_protocol
from selfpruner_hub.models.architectures import architecture_of, shape_of
from selfpruner_hub.models.devices import out_of_memory
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape
from selfpruner_hub.plans.target import RUNTIME, Meter, Target, check_beta, needs_target, target_of
from selfpruner_hub.plans.uniform import UniformBudget
from selfpruner_hub.progress import Progress
from selfpruner_hub.pruning.experts import SCORES
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.model_record import Metric, Record


class Aim(Protocol):
    """The source of a run's budget, and the measurement of the pruned model at its end."""

    def budget(self, settings: PruneSettings, progress: Progress) -> Budget:
        """Make the budget under the bounds of these settings."""
        ...

    def measured(self, record: Record, budget: Budget, pruned: PreTrainedModel, progress: Progress) -> Record:
        """Add the measured costs of both models to the record."""
        ...


@dataclass(frozen=True)
class ShareOfWeights:
    """A mean rate β: nothing is measured."""

    beta: float
    dense: PreTrainedModel

    def budget(self, settings: PruneSettings, progress: Progress) -> Budget:
        """Make the budget of β."""
        return _kind(settings)(_shape(self.dense, settings), self.beta, **_bounds(settings))

    def measured(self, record: Record, budget: Budget, pruned: PreTrainedModel, progress: Progress) -> Record:
        """Return the record as it is."""
        return record


@dataclass(frozen=True)
class TargetInRuntime:
    """A target, with the meter of its runtime."""

    target: Target
    meter: Meter
    dense: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None

    def budget(self, settings: PruneSettings, progress: Progress) -> Budget:
        """Make the budget from the cost of each width in the runtime."""
        costs = self.meter.costs(self.dense, self.tokenizer, self.target, progress)
        return _kind(settings).for_target(_shape(self.dense, settings), costs, self.target, **_bounds(settings))

    def measured(self, record: Record, budget: Budget, pruned: PreTrainedModel, progress: Progress) -> Record:
        """Measure both models in the runtime; a failure is recorded, since the pruned model itself is there."""
        try:
            costs = self.meter.measure(self.dense, pruned, self.tokenizer, self.target, progress)
        except Exception as error:  # runtimes have errors of their own
            failure = error if isinstance(error, SelfPrunerError) else out_of_memory(error)
            why = str(failure or f"{type(error).__name__}: {error}").splitlines()[0]
            return reached(record, self.target, budget.costs, why)
        return reached(record, self.target, budget.costs, costs)


def aim_of(
    beta: float | None,
    target: Mapping[str, Any] | None,
    runtime: str | Meter | None,
    request: tuple[int, int] | None,
    dense: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Aim:
    """Make the aim of a run from exactly one of β and a target.

    Args:
        beta: Mean share of the prunable weights to remove, or None.
        target: One quantity and its value, as for `AutoPruner.prune`, or None.
        runtime: Name or meter of the target's runtime; None for a β, and for PyTorch.
        request: Tokens of the prompt, and tokens generated after it; None for a β, and for `REQUEST`.
        dense: Dense model.
        tokenizer: Tokenizer of the model, or None.

    Returns:
        The aim.

    Raises:
        UserError: Both or neither are given, a runtime is given with β, a value is out of its range, or the target is
            one that fewer experts do not change.
    """
    if target is None:
        needs_target(runtime, request)
        return ShareOfWeights(check_beta(beta), dense)
    if beta is not None:
        raise UserError("beta and a target are both given.", "Give one of them.")
    where = RUNTIME if runtime is None else runtime
    meter = meter_of(where) if isinstance(where, str) else where
    check_protocol(meter, "runtime", ("name", "costs", "measure"))
    aimed = target_of(target, meter.name, request)
    if shape_of(dense.config).expert_weights and aimed.quantity != "memory":
        raise UserError(
            f"A mixture of experts has no target {aimed.quantity}: a token is routed to as many experts as before, and "
            "attention stays whole, so only the bytes of the weights change.",
            "Give memory=…, or beta.",
        )
    return TargetInRuntime(aimed, meter, dense, tokenizer)


def meter_of(runtime: str, python: str | Path | None = None) -> Meter:
    """Make the meter of a runtime.

    Args:
        runtime: Name of the runtime: `"torch"`, `"onnx"`, `"gguf"` or `"vllm"`.
        python: Path of the Python of a runtime that has an environment of its own (`"vllm"`).

    Returns:
        The meter.

    Raises:
        UserError: Targets cannot be measured in the runtime, or its library is missing.
    """
    from exporters.benchmark.meter import RuntimeMeter  # it imports this package

    return RuntimeMeter(runtime, python=python)


def reached(record: Record, target: Target, costs: Costs, measured: tuple[float, float] | str) -> Record:
    """Add the measured figure of a target to the record, beside the predicted one.

    Args:
        record: Record of the pruned model, from `describe`.
        target: Target of the run.
        costs: Cost of each width, from which the budget was made.
        measured: Cost of the dense and of the pruned model, or the reason why they were not measured.

    Returns:
        The record: `method["target"]` has `predicted` and `measured` in the terms of the target, and the costs of both
        models are a metric.
    """
    figures = dict(record.method["target"])
    if isinstance(measured, str):
        return replace(record, method={**record.method, "target": {**figures, "measured": None, "why": measured}})
    dense, pruned = measured
    figures["measured"] = round(target.figure(pruned, dense), 6)
    metric = Metric(
        value=round(pruned, 2),
        dense=round(dense, 2),
        protocol=f"{target.charged}; asked for {target.name}: predicted "
        f"{target.said(figures['predicted'])}, measured {target.said(figures['measured'])}; predicted "
        f"{target.said_cost(costs.of(record.plan))}, and {target.said_cost(costs.dense)} dense",
        unit=target.unit,
        machine=platform.processor() or platform.machine(),
        date=datetime.now(UTC).date().isoformat(),
    )
    metrics = {**record.metrics, f"{target.quantity} in {target.runtime}": metric}
    return replace(record, method={**record.method, "target": figures}, metrics=metrics)


def completed(settings: PruneSettings, shape: ModelShape) -> PruneSettings:
    """Fill in the settings that depend on the model, or on others.

    Args:
        settings: Settings of a preset, with the changes of the user.
        shape: Geometry of the model.

    Returns:
        The settings of the run. Those of a mixture of experts are what its experts have: an order of their own in place
        of one of channels, a repair of their output projections alone, and no effects of small steps.

    Raises:
        UserError: `uniform` is combined with a search, or a model without experts has a setting of experts.
    """
    settings = replace(settings, multiple_of=settings.multiple_of or shape.default_multiple)
    orders_experts = settings.importance in SCORES
    if orders_experts and not shape.expert_weights:
        raise UserError(f"importance={settings.importance!r} orders experts, and this model has none.", "Leave it out.")
    if settings.fewest_experts and not shape.expert_weights:
        raise UserError("fewest_experts is given, and this model has no experts.", "Leave it out.")
    if shape.expert_weights:
        settings = replace(
            settings,
            importance=settings.importance if orders_experts else "reap-sum",
            repair={"full": "sequential", "output": "none"}.get(settings.repair, settings.repair),
            seeds=tuple(seed for seed in settings.seeds if seed != "refined") or ("sensitivity",),
        )
    if not settings.uniform:
        return settings
    if settings.schedule.length:
        raise UserError("uniform leaves one plan, and nothing to search.", "Leave out one of them.")
    return replace(settings, seeds=("uniform",))


def _shape(dense: PreTrainedModel, settings: PruneSettings) -> ModelShape:
    shape, experts = shape_of(dense.config), architecture_of(dense.config).experts
    if experts is None or not settings.fewest_experts:
        return shape
    return replace(shape, fewest_units=max(experts.fewest, settings.fewest_experts))


def _kind(settings: PruneSettings) -> type[Budget]:
    return UniformBudget if settings.uniform else Budget


def _bounds(settings: PruneSettings) -> dict[str, Any]:
    names = ("p_min", "p_max", "tied", "multiple_of", "kv_multiple")
    return {name: getattr(settings, name) for name in names}
