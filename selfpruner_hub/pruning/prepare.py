"""A model made ready for cutting: calibrated, its units ordered, repairs of every width at hand."""

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
from selfpruner_hub.pruning.slicing import Slicer, ordered
from selfpruner_hub.settings import Method
from selfpruner_hub.storage.run import DEFAULT_RUN, Run


@dataclass(frozen=True)
class Prepared:
    """What cutting needs."""

    order: Sequence[LayerOrder]
    """Of every layer's units, most important first, in which the weights stand."""
    slicer: Slicer
    """Cuts the layers; its factors take more memory than the model."""
    curves: Sequence[LossCurves] | None
    """Predicted loss of each layer alone; None where nothing reads it."""


def fisher_information(model: PreTrainedModel, windows: Tensor, method: Method, run: Run) -> Fisher | None:
    """Take the Fisher information of the outputs of all layers, where a setting reads it.

    It comes before everything else, since a backward pass takes much memory.

    Args:
        model: The dense model.
        windows: Token ids of the calibration, `[N, W]`; the first of them are read.
        method: The settings.
        run: Surroundings.

    Returns:
        As `output_fisher`; None where no setting reads it.
    """
    if not (method.predicts_losses or method.importance == "obs" or method.repairs_twice):
        return None
    return output_fisher(model, windows[: max(1, method.fisher_tokens // windows.shape[1])], run)


@contextmanager
def prepared(
    model: PreTrainedModel, windows: Tensor, method: Method, fisher: Fisher | None = None, run: Run = DEFAULT_RUN
) -> Iterator[Prepared]:
    """Calibrate a model and put its weights into order of importance, in place, for as long as the context lasts.

    Args:
        model: The dense model; its function does not change, and at the end its weights are as they were.
        windows: Token ids of the calibration, `[N, W]`.
        method: The settings: order, repair.
        fisher: What `fisher_information` returned.
        run: Surroundings.

    Yields:
        The slicer of the model, and the loss curves.
    """
    statistics = calibrate(model, windows, run)
    order = rank(model, statistics, method.importance, fisher, run)
    with ordered(model, order):
        slicer = Slicer(model, order, _drained(statistics), run.store, fisher)
        curves = slicer.loss_curves() if fisher else None
        yield Prepared(order, slicer if method.repair else Slicer(model, order, None, run.store), curves)


def _drained(items: list[Any]) -> Iterator[Any]:
    """Yield the items and let go of each, so that a layer's statistics end where its repair begins."""
    while items:
        yield items.pop(0)
