"""The cut: calibrate, find the plan, slice the model by it, and repair what is left."""

from __future__ import annotations

from transformers import PreTrainedModel

from selfpruner_hub.calibration.texts import RunTexts
from selfpruner_hub.memory import settle
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import slice_model
from selfpruner_hub.search.find_plan import find_plan
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.outcome import SearchResult
from selfpruner_hub.search.proposers import Proposer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import Run


def cut(
    dense: PreTrainedModel,
    proposer: Proposer,
    budget: Budget,
    texts: RunTexts,
    journal: Journal,
    settings: PruneSettings,
    run: Run,
) -> tuple[PreTrainedModel, SearchResult]:
    """Cut a dense model, which is left as it was.

    Args:
        dense: The dense model; it must not run elsewhere meanwhile.
        proposer: Proposer of a search.
        budget: Parameter budget.
        texts: Texts of the run.
        journal: Journal of the search.
        settings: Settings of the run.
        run: Run context.

    Returns:
        The pruned model, and how its plan was found.

    Raises:
        ModelError: The model's activations or statistics are degenerate.
    """
    calibration = texts.calibration.windows
    fisher = fisher_information(dense, calibration, settings, run)
    with prepared(dense, calibration, settings, fisher, run) as ready:
        result = find_plan(proposer, budget, ready, texts, journal, settings, run)
        model = slice_model(ready.slicer, result.outcome.best.plan, stock=settings.uniform)
        del ready  # its Cholesky factors take more memory than the model
    if settings.repairs_twice:
        compensate(dense, model, calibration, inputs=settings.repair == "full", fisher=fisher, run=run)
    settle(model, dense, run.store)
    return model, result
