"""Provenance of a pruned model: the settings that identify its search, and the record of how it was made."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from selfpruner_hub.calibration.texts import RunTexts
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.weights import count_parameters
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan, widths_of
from selfpruner_hub.search.llm import prompts, reply_schema
from selfpruner_hub.search.outcome import SearchResult
from selfpruner_hub.search.proposers import Proposer
from selfpruner_hub.settings import LanguageModelOptions, PruneSettings
from selfpruner_hub.storage.model_record import Metric, Record

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """Request of a run: model, budget, settings, seed, proposer and texts."""

    name: str
    """Name of the dense model."""
    identity: dict[str, Any]
    """Identity of the dense model, as `models.weights.identity_of` returns it."""
    budget: Budget
    """Parameter budget of the search."""
    settings: PruneSettings
    """Settings of the run."""
    seed: int
    """Random seed."""
    proposer: Proposer
    """Source of rates."""
    texts: RunTexts
    """Texts of the run."""
    revision: str
    """Commit of the dense model on the Hub; empty where it came from elsewhere."""
    licence: dict[str, str]
    """Licence of the dense model, as `hub.parent.licence_of` returns it."""
    date: str | None
    """Date that the chat template is given, where it asks for one."""


def fingerprint(request: RunRequest) -> dict[str, Any]:
    """Collect every setting that changes the course of a search; a run directory belongs to one such set.

    Args:
        request: What the run is asked to do.

    Returns:
        The settings for the journal's header, JSON-serialisable.
    """
    options, texts = options_of(request.proposer), request.texts
    return {
        "model": request.name,
        **request.identity,
        "shape": request.budget.shape.record(),
        "beta": request.budget.share,
        "seed": request.seed,
        "proposer": request.proposer.name,
        **_target(request.budget),
        **request.settings.record(),
        **({"options": options.record(), "prompts": _prompts(options)} if options else {}),
        "data": [text.sha256 for text in texts if text is not None],
    }


def options_of(proposer: Proposer) -> LanguageModelOptions | None:
    """Return the options of a language model that proposes; None for another proposer."""
    options = getattr(proposer, "options", None)
    return options if isinstance(options, LanguageModelOptions) else None


def _prompts(options: LanguageModelOptions) -> list[str]:
    return [prompts.template(operation, options.template_directory) for operation in reply_schema.PARENTS]


def describe(
    pruned: PreTrainedModel,
    request: RunRequest,
    result: SearchResult,
    logit_scale: float,
) -> Record:
    """Make the record of a pruned model.

    Args:
        pruned: Pruned model.
        request: What the run was asked to do.
        result: Result of the search, and its gains.
        logit_scale: Factor by which the logits of the pruned model are scaled.

    Returns:
        The record, with parameters counted from the tensors.
    """
    budget, settings, texts = request.budget, request.settings, request.texts
    outcome, searched, options = result.outcome, texts.search, options_of(request.proposer)
    plan = outcome.best.plan
    weighed = ", weighed for the second repair," if settings.weighs_excess else ""
    protocol = (
        f"{settings.fitness}{weighed} on {result.tokens} tokens of {searched.name} that the search selected on, "
        f"windows of {searched.windows.shape[1]}: a figure of the search, not of quality"
    )
    return Record(
        base_model=request.name,
        beta=round(budget.shape.beta(plan), 6) if budget.target else budget.share,
        achieved_beta=round(budget.shape.beta(plan), 6),
        rates=tuple(round(rate, 6) for rate in budget.shape.rates(plan)),
        widths=widths_of(plan),
        parameters={"dense": request.identity["parameters"], "pruned": count_parameters(pruned)},
        parent=request.identity,
        method={**settings.record(), **_target(budget, plan)},
        seed=request.seed,
        proposer={
            "name": request.proposer.name,
            **({"options": options.record()} if options else {}),
            "evaluations": round(outcome.spent, 4),
            "best_from": outcome.best.origin,
            "replies": outcome.counts,
            "tokens": outcome.tokens,
            "gains": _gains(result.gains),
        },
        data={
            "calibration": texts.calibration.record(),
            "fitness": searched.record(),
            **({"unseen": texts.unseen.record()} if texts.unseen is not None else {}),
            **({"chat_template": {"date": request.date}} if request.date is not None else {}),
        },
        versions=library_versions(),
        base_revision=request.revision,
        licence=request.licence,
        metrics={
            "search_fitness": Metric(round(outcome.best.fitness, 6), None, protocol),
            "search_logit_scale": Metric(
                logit_scale,
                1.0,
                "all logits times this, by the gain of the last norm: least KL to the parent on the fitness text",
            ),
        },
    )


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the result of a run depends on, by name."""
    libraries = ("selfpruner-hub", "torch", "transformers")
    return {"python": platform.python_version(), **{library: version(library) for library in libraries}}


def revision_of(record: Record, name: str) -> dict[str, Any]:
    """The keyword of `from_pretrained` for the commit that a model was pruned from.

    Args:
        record: Record of the pruned model.
        name: Directory or Hub repository of what is taken for its parent.

    Returns:
        `revision`; nothing where the commit is not known, or the name is not that of the record.
    """
    known = record.base_revision and name == record.base_model and not Path(name).is_dir()
    return {"revision": record.base_revision} if known else {}


def check_parent(record: Record, identity: Mapping[str, Any], name: str) -> None:
    """Refuse a model that is not the one that a pruned model was made from.

    Args:
        record: Record of the pruned model.
        identity: Identity of the model that is taken for its parent (`models.weights.identity_of`); weights of another
            dtype than the parent's, or that could not be read, are not compared.
        name: Name of that model, for the message.

    Raises:
        UserError: It is another model.
    """
    parent = {"parameters": record.parameters["dense"], **record.parent}
    unread = ("dtype", "weights") if identity["dtype"] != parent.get("dtype") or not identity["weights"] else ("dtype",)
    if different := [key for key in parent if key not in unread and identity[key] != parent[key]]:
        raise UserError(
            f"{name!r} is not {record.base_model!r}, the parent of this model: other {' and '.join(different)}.",
            "Give the model that was pruned.",
        )


def _target(budget: Budget, plan: Plan | None = None) -> dict[str, Any]:
    """Return the target of a budget, with what is predicted of a plan, under the key of files; nothing for a β."""
    if budget.target is None:
        return {}
    target, costs = budget.target, budget.costs
    fields: dict[str, Any] = {**target.record(), "costs": costs.digest()}
    if plan is not None:
        fields["predicted"] = round(target.figure(costs.of(plan), costs.dense), 6)
    return {"target": fields}


def _gains(measured: dict[str, tuple[float, float]]) -> dict[str, list[float]]:
    """Return the gains as JSON, without texts on which a plan has no finite fitness."""
    return {text: [round(value, 6) for value in pair] for text, pair in measured.items() if all(map(isfinite, pair))}


def trained(record: Record, model: PreTrainedModel, how: str) -> Record:
    """Make the record of a pruned model whose weights were trained: it has no figures of the old weights.

    Args:
        record: Record of the pruned model.
        model: Trained model, in memory.
        how: Method and data of the training, in one line.

    Returns:
        The record.

    Raises:
        UserError: The model has other widths, adapters or values that are not finite, or `how` is not one line.
    """
    if not isinstance(how, str) or not how.strip() or "\n" in how:
        raise UserError("Say in one line how the model was trained.", 'For example "LoRA of rank 16 on my-data".')
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise UserError("The model still has adapters.", "Merge them first: model.merge_and_unload().")
    if shape_of(model.config).dense != record.plan:
        raise UserError("The trained model has other widths than the pruned one.", "Train this model: pruned.model.")
    broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
    if broken:
        raise UserError(f"The training diverged: {broken[0]} is not finite.", "Train with a lower learning rate.")
    earlier = record.method.get("training")
    return _after_training(record, f"{earlier}, then {how.strip()}" if earlier else how.strip())


def changed_in_place(record: Record) -> Record:
    """Make the record of a pruned model whose weights were changed without a word on how: it has no old figures."""
    logger.warning(
        "The weights were changed after pruning: the record drops the figures of the old ones. Say how they were "
        'changed: pruned.retrained(pruned.model, "LoRA of rank 16 on my-data").'
    )
    training = record.method.get("training")
    how = f"{training}, then changed again" if training else "how is not recorded"
    return _after_training(record, how)


def _after_training(record: Record, how: str) -> Record:
    """Leave out the figures of the old weights, but not the names of the texts that they were trained on."""
    read = [*record.method.get("trained_on", ()), *(text["name"] for text in (record.recovery or {}).get("texts", ()))]
    method = {**record.method, "training": how, **({"trained_on": sorted({*read})} if read else {})}
    return replace(record, metrics={}, method=method, recovery=None)
