"""Prepare a model for cutting: calibrate it, order its units by importance, factor its first repairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import Fisher, output_fisher
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import DEFAULT_RUN, Run


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be cut."""

    order: Sequence[LayerOrder]
    """Order of importance of every layer's units, in which the weights are stored."""
    slicer: Slicer
    """Slicer that cuts the layers; its factors take more memory than the model."""
    curves: Sequence[LossCurves] | None
    """Predicted loss of each layer alone; None without Fisher information."""


def fisher_information(model: PreTrainedModel, windows: Tensor, method: PruneSettings, run: Run) -> Fisher | None:
    """Measure the Fisher information of the outputs of all layers, if a setting needs it.

    It runs before every other stage, because a backward pass takes much memory.

    Args:
        model: The dense model.
        windows: Token ids of the calibration text, `[N, W]`; only the first `fisher_tokens` tokens are read.
        method: Settings.
        run: Run context.

    Returns:
        Result of `output_fisher`; None if no setting needs it.
    """
    if not (method.predicts_losses or method.importance == "obs" or method.repairs_twice):
        return None
    return output_fisher(model, windows[: max(1, method.fisher_tokens // windows.shape[1])], run)


@contextmanager
def prepared(
    model: PreTrainedModel, windows: Tensor, method: PruneSettings, fisher: Fisher | None = None, run: Run = DEFAULT_RUN
) -> Iterator[Prepared]:
    """Calibrate a model and put its weights into order of importance, in place, while the context lasts.

    Args:
        model: The dense model; it computes the same function, and on exit its weights are restored.
        windows: Token ids of the calibration text, `[N, W]`.
        method: Settings: order, repair.
        fisher: Result of `fisher_information`.
        run: Run context.

    Yields:
        The order, the slicer and the loss curves of the model.
    """
    statistics = calibrate(model, windows, run)
    order = rank(model, statistics, method.importance, fisher, run)
    with ordered(model, order):
        slicer = Slicer(model, order, _drained(statistics), run.store, fisher)
        curves = slicer.loss_curves() if fisher else None
        yield Prepared(order, slicer if method.repair else Slicer(model, order, None, run.store), curves)


def _drained(items: list[Any]) -> Iterator[Any]:
    """Yield the items and remove each from the list, so that a layer's statistics are freed as its repair is built."""
    while items:
        yield items.pop(0)
