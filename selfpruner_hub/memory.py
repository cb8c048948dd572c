"""The memory of an accelerator that a run takes, and so the place where what it makes rests."""

from __future__ import annotations

from typing import NamedTuple

import psutil
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear, shape_of
from selfpruner_hub.models.devices import free_memory
from selfpruner_hub.models.placement import settle_layers, stream_layers
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.offload import HostStore, TensorStore

USABLE = 0.9
"""Share of the free memory that a run may take; the rest is for what operators take inside."""
WORKING, PASSING = 2.95, 3
"""Memory for the work on one layer, in multiples of its weights and of the statistics of its output projections: what
operators read and write, and what the second repair keeps between its steps."""
GIB = 2**30


class Needs(NamedTuple):
    """Bytes that a run takes beside the weights of the dense model."""

    resting: int
    """Most that rests at any time: factors, Fisher information, repaired weights, the pruned model, activations."""
    working: int
    """What the layer that is worked on takes."""
    passing: int
    """What the second repair of a layer keeps between its steps: on the host where other things rest there, else on the
    device."""


def store_for(model: PreTrainedModel, store: TensorStore, settings: PruneSettings, share: float) -> TensorStore:
    """Choose where what a run makes rests: on the accelerator if it fits there, else in the memory of the host.

    Of several processes, all choose by the least free memory of any: they work on the same candidates in step.

    Args:
        model: The dense model, on the device that works.
        store: Store that was asked for; one that keeps tensors apart is taken.
        settings: Settings of the run.
        share: Share of the prunable weights that is removed.

    Returns:
        The store.

    Raises:
        ModelError: Neither the device nor the host has room.
    """
    free = USABLE * min(ranks.gathered(free_memory(model.device)))
    if store.apart or free == float("inf") or shape_of(model.config).expert_weights:  # a mixture has no large factors
        return store
    resting, working, passing = needs(model, settings, share)
    resting += passing
    if resting + working <= free:
        return store
    host = USABLE * min(ranks.gathered(psutil.virtual_memory().available)) / ranks.count()  # all are on one machine
    if working > free or resting > host:
        raise ModelError(
            f"This run takes {(resting + working) / GIB:.1f} GiB beside the model, {working / GIB:.1f} of them on "
            f"{model.device}; there are {free / GIB:.1f} GiB free there, and {host / GIB:.1f} on the host.",
            "Use offload_folder (--offload), which keeps weights and statistics in files, or a larger device.",
        )
    return HostStore(pinned=model.device.type == "cuda")


def settle(pruned: PreTrainedModel, dense: PreTrainedModel, store: TensorStore) -> None:
    """Put a pruned model on the device of its dense model; where it rests in files, its layers are there as they run.

    So are those that rest on the host, if they do not fit beside the dense model, until `PrunedModel.to` moves them.
    """
    if not store.apart:
        return
    fits = sum(parameter.nbytes for parameter in pruned.parameters()) <= USABLE * free_memory(dense.device)
    stream_layers(pruned, dense.device)
    if isinstance(store, HostStore) and fits:
        settle_layers(pruned)


def needs(model: PreTrainedModel, settings: PruneSettings, share: float) -> Needs:
    """Count the memory of a run.

    Args:
        model: The dense model; no mixture of experts.
        settings: Settings of the run.
        share: Share of the prunable weights that is removed.

    Returns:
        The bytes.
    """
    architecture, layers = architecture_of(model.config), decoder_layers(model)
    item, hidden = model.dtype.itemsize, shape_of(model.config).hidden_size
    widths = [
        [linear(layer, path).in_features for path in (architecture.attention_output, architecture.ffn_output)]
        for layer in layers
    ]
    factors = sum(4 * width**2 for pair in widths for width in pair) // ranks.count()  # a layer's owner has them
    outputs = sum(item * hidden * width for pair in widths for width in pair)
    fisher = 2 * 4 * hidden**2 * len(layers) if settings.fisher_tokens else 0
    weights = sum(parameter.nbytes for parameter in model.parameters())
    pruned = weights - share * sum(parameter.nbytes for parameter in layers.parameters())
    attention, ffn = (max(sizes) for sizes in zip(*widths, strict=True))
    activations = settings.calibration_tokens * item * (6 * hidden + attention + 3 * ffn)
    resting = fisher + max(factors + outputs + max(outputs, pruned), pruned + activations)
    largest = max(sum(parameter.nbytes for parameter in layer.parameters()) for layer in layers)
    layer = largest + 4 * (attention**2 + ffn**2)
    return Needs(int(resting), int(WORKING * layer), PASSING * layer)
