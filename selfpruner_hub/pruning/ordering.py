"""Put dense weights into order of importance, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.interrupts import uninterrupted
from selfpruner_hub.models.architectures import (
    Block,
    architecture_of,
    decoder_layers,
    expert_tensors,
    linear,
    shape_of,
    unit_rows,
)
from selfpruner_hub.pruning.importance import LayerOrder, expand


@contextmanager
def ordered(model: PreTrainedModel, order: Sequence[LayerOrder]) -> Iterator[None]:
    """Put the dense weights into order of importance, in place, and restore the dense order on exit.

    The model computes the same function throughout. One weight is copied at a time. An interrupt waits until all layers
    are in one order.
    """
    permuted = False
    try:
        with uninterrupted():
            permute(model, order)
            permuted = True
        yield
    finally:
        if permuted:
            with uninterrupted():
                permute(model, [o.inverse() for o in order])


@torch.no_grad()
def permute(model: PreTrainedModel, order: Sequence[LayerOrder]) -> None:
    """Reorder KV groups and FFN channels, or experts, of every layer in place; the model's function does not change.

    On any error, such as too little memory for the copy of a weight, the model has its old order.
    """
    done: list[tuple[Tensor, int, Tensor]] = []
    try:
        for tensor, dim, indices in _moves(model, order):
            tensor.copy_(tensor.index_select(dim, indices))
            done.append((tensor, dim, indices))
    except BaseException:
        for tensor, dim, indices in reversed(done):
            tensor.copy_(tensor.index_select(dim, indices.argsort()))
        raise


def _moves(model: PreTrainedModel, order: Sequence[LayerOrder]) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Yield each tensor to reorder, its dimension, and the new order of its indices."""
    architecture, shape = architecture_of(model.config), shape_of(model.config)
    for layer, by in zip(decoder_layers(model), order, strict=True):
        for tensor, dimension in expert_tensors(architecture, layer).values():
            yield tensor, dimension, by.channels.to(tensor.device)
        if architecture.experts is not None:
            continue
        parameters = dict(layer.named_parameters())
        for projection in architecture.rows:
            indices, offset = [], 0
            for block in projection.blocks:
                rows = expand(_indices(by, block), unit_rows(shape, block))
                indices.append(rows + offset)
                offset += len(rows)
            rows = torch.cat(indices)
            for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
                if name in parameters:
                    tensor = parameters[name].data
                    by_row = tensor.view(len(rows), -1)  # a norm's weight may be [heads, head_dim]
                    yield by_row, 0, rows.to(tensor.device)
        for path, columns in (
            (architecture.attention_output, expand(by.groups, unit_rows(shape, "query"))),
            (architecture.ffn_output, by.channels),
        ):
            weight = linear(layer, path).weight
            yield weight.data, 1, columns.to(weight.device)


def _indices(order: LayerOrder, block: Block) -> Tensor:
    return order.channels if block == "channel" else order.groups
