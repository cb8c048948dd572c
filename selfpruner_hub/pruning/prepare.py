"""Prepare a model for cutting: check it, calibrate it, order its units by importance, factor its first repairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.calibration.fisher import Fisher, output_fisher, roots_of
from selfpruner_hub.calibration.statistics import MakeStatistics, calibrated
from selfpruner_hub.errors import ModelError, UserError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, shape_of
from selfpruner_hub.models.devices import refuse_float16
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.pruning.experts import rank_experts
from selfpruner_hub.pruning.importance import LayerOrder, rank_layer
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.output_repair import LayerRepairs, Repair, output_projections, repair_layer
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import DEFAULT_RUN, Run


def check_model(model: Any) -> None:
    """Check that an object is a model in a state that can be pruned.

    Args:
        model: Object that a user gave as the dense model.

    Raises:
        UserError: It is no transformers model, or it is compiled.
        ModelError: It has adapters, weights of several dtypes, in float16, or such that cannot take part in a backward
            pass, it has other layers than its configuration, or its attention has no backward pass here.
    """
    if hasattr(model, "_orig_mod"):
        raise UserError("The model is compiled.", "Prune the model that was given to torch.compile.")
    if not isinstance(model, PreTrainedModel):
        raise UserError(
            f"A transformers model is needed; got {type(model).__name__}.",
            "Give AutoPruner a model, its tokenizer and a name, or give AutoPruner.from_pretrained the name alone.",
        )
    shape_of(model.config)  # fails where the architecture is not supported
    if any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ModelError("The model has adapters.", "Merge them into its weights first, or delete them.")
    experts = architecture_of(model.config).experts
    router = f".{experts.block}.{experts.router}." if experts is not None else None  # may have a dtype of its own
    named = [(name, str(parameter.dtype)) for name, parameter in model.named_parameters()]
    dtypes = sorted({dtype.removeprefix("torch.") for name, dtype in named if router is None or router not in name})
    if len(dtypes) > 1:
        raise ModelError(
            f"The model has weights in {' and '.join(dtypes)}; pruning needs one dtype.",
            f"Convert it first: model.to(torch.{next(dtype for dtype in dtypes if dtype != 'float16')}).",
        )
    refuse_float16(model.dtype)
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ModelError(
            "The model was made in torch.inference_mode(), so no gradients can be taken.", "Load it outside of that."
        )
    layers, configured = len(decoder_layers(model)), len(shape_of(model.config).dense.layers)
    if layers != configured:
        raise ModelError(
            f"The model has {layers} layers, and its configuration says {configured}.",
            "Set num_hidden_layers, and layer_types if there are any, to the layers that are left.",
        )
    if model.device.type == "cpu" and model.config._attn_implementation == "flex_attention":
        raise ModelError(
            "flex_attention has no backward pass on a CPU, and pruning needs one.",
            'Choose another: model.set_attn_implementation("sdpa").',
        )


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be cut."""

    order: Sequence[LayerOrder]
    """Order of importance of every layer's units, in which the weights are stored."""
    slicer: Slicer
    """Slicer that cuts the layers; its factors take more memory than the model."""
    curves: Sequence[LossCurves] | None
    """Predicted loss of each layer alone; None without Fisher information."""


def fisher_information(model: PreTrainedModel, windows: Tensor, settings: PruneSettings, run: Run) -> Fisher | None:
    """Measure the Fisher information of the outputs of all layers, if a setting needs it.

    It runs before every other stage, because a backward pass takes much memory.

    Args:
        model: The dense model.
        windows: Token ids of the calibration text, `[N, W]`; only the first `fisher_tokens` tokens are read.
        settings: Settings.
        run: Run context.

    Returns:
        Result of `output_fisher`; None if no setting needs it.
    """
    if not (settings.predicts_losses or settings.importance == "obs" or settings.repairs_twice):
        return None
    return output_fisher(model, windows[: max(1, settings.fisher_tokens // windows.shape[1])], run)


@contextmanager
def prepared(
    model: PreTrainedModel,
    windows: Tensor,
    settings: PruneSettings,
    fisher: Fisher | None = None,
    run: Run = DEFAULT_RUN,
) -> Iterator[Prepared]:
    """Calibrate a model and put its weights into order of importance, in place, while the context lasts.

    Args:
        model: The dense model; it computes the same function, and on exit its weights are restored. The experts of a
            mixture have no first repair: which of them run depends on the plan.
        windows: Token ids of the calibration text, `[N, W]`.
        settings: Settings: order, repair.
        fisher: Result of `fisher_information`.
        run: Run context.

    Yields:
        The order, the slicer and the loss curves of the model.
    """
    if architecture_of(model.config).experts is not None:
        order, found = rank_experts(model, windows, settings.importance, fisher, run)
        with ordered(model, order):
            yield Prepared(order, Slicer(model, None, run.store), found if fisher else None)
        return
    order, repairs = _rank_and_factor(model, windows, settings, fisher, run)
    with ordered(model, order):
        slicer = Slicer(model, repairs or None, run.store)
        curves = slicer.loss_curves() if fisher else None
        yield Prepared(order, slicer if settings.repair != "none" else Slicer(model, None, run.store), curves)


Roots = tuple[Tensor | None, Tensor | None]
"""R of the outputs of a layer's attention and FFN (`fisher.roots_of`)."""
_RIDGES, _NORMS = ("attention.ridge", "ffn.ridge"), ("attention.norms", "ffn.norms")
"""Names in the summary of a layer, beside those of its order: λ, and the norms of `Repair`."""


def _rank_and_factor(
    model: PreTrainedModel, windows: Tensor, settings: PruneSettings, fisher: Fisher | None, run: Run
) -> tuple[list[LayerOrder], list[LayerRepairs]]:
    """Order and factor each layer while its statistics are there.

    Several processes sum the statistics of as many layers together, and then each works on the one that it owns.
    """
    order: list[LayerOrder] = []
    repairs: list[LayerRepairs] = []
    pending: tuple[int, MakeStatistics, Roots] | None = None
    layers = len(decoder_layers(model))
    roots = roots_of(fisher, layers, model.device)
    for index, (make_statistics, root) in enumerate(zip(calibrated(model, windows, run), roots, strict=True)):
        if ranks.owns(index):
            pending = index, make_statistics, root
        if (index + 1) % ranks.count() and index + 1 < layers:
            continue
        made = _finish_layer(model, *pending, settings, fisher is not None, run) if pending else None
        for summary in filter(None, ranks.gathered(made and made[0])):
            number = len(order)
            run.checkpoints.save(f"layer-{number}", {name: summary[name] for name in ("groups", "channels", *_RIDGES)})
            order.append(LayerOrder(summary["groups"].to(model.device), summary["channels"].to(model.device)))
            if _NORMS[0] in summary:
                own = made[1] if made and ranks.owns(number) else None
                repairs.append(own or _remote_repairs(model, number, summary))
        pending = None
    return order, repairs


def _finish_layer(
    model: PreTrainedModel,
    index: int,
    make_statistics: MakeStatistics,
    roots: Roots,
    settings: PruneSettings,
    predicts: bool,
    run: Run,
) -> tuple[dict[str, Tensor], LayerRepairs | None]:
    """The summary of a layer, for all processes, and the repairs that its owner keeps; a checkpoint has order and λ."""
    checkpoint = run.checkpoints.load(f"layer-{index}", model.device)
    ridges = None if checkpoint is None else {name.partition(".")[0]: checkpoint[name].item() for name in _RIDGES}
    statistics = make_statistics(ridges)
    if checkpoint is None:
        order = rank_layer(model, index, statistics, settings.importance, roots)
    else:
        order = LayerOrder(checkpoint["groups"], checkpoint["channels"])
    summary = {"groups": order.groups, "channels": order.channels}
    summary |= {
        name: torch.tensor(part.ridge, dtype=torch.float64)
        for name, part in zip(_RIDGES, (statistics.attention, statistics.ffn), strict=True)
    }
    repairs = None
    if predicts or settings.repair != "none":
        repairs = repair_layer(model, index, order, statistics, roots, run.store)
        summary |= {name: repair.norms for name, repair in zip(_NORMS, repairs, strict=True)}
    return {name: tensor.cpu() for name, tensor in summary.items()}, repairs


def _remote_repairs(model: PreTrainedModel, index: int, summary: dict[str, Tensor]) -> LayerRepairs:
    """The repairs of a layer that another process owns."""
    attention, ffn = (
        Repair(index, module, summary[name].to(model.device))
        for module, name in zip(output_projections(model, index), _NORMS, strict=True)
    )
    return attention, ffn
