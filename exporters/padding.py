"""Decoder layers with zeros added: wider, and the same function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from selfpruner_hub.models.architectures import architecture_of, block_rows, shape_of
from selfpruner_hub.plans.plan import LayerWidths


def padded_state(
    layer: nn.Module, config: PreTrainedConfig, own: LayerWidths, target: LayerWidths
) -> dict[str, Tensor]:
    """Pad a decoder layer with zeros: rows of q, k, v, gate and up, columns of o and down.

    An added KV group attends evenly to values that are zero, an added channel is silu(0) · 0 or its like: nothing
    reaches the residual stream.

    Args:
        layer: Of the architecture and widths that the next two say.
        config: Of its model.
        own: Its widths.
        target: Widths to reach, none smaller.

    Returns:
        Its tensors by name; those that do not grow are the layer's own.
    """
    architecture, shape = architecture_of(config), shape_of(config)
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for projection in architecture.inputs:
        before = [block_rows(shape, own, block) for block in projection.blocks]
        after = [block_rows(shape, target, block) for block in projection.blocks]
        for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
            if name in state:
                state[name] = pad_rows(state[name], before, after)
    for path, columns in (
        (architecture.attention_output, block_rows(shape, target, "query")),
        (architecture.ffn_output, target.intermediate_size),
    ):
        weight = state[f"{path}.weight"]
        if columns > weight.shape[1]:
            state[f"{path}.weight"] = nn.functional.pad(weight, (0, columns - weight.shape[1]))
    return state


def pad_rows(tensor: Tensor, before: Sequence[int], after: Sequence[int]) -> Tensor:
    """Add zero rows at the end of each block of rows.

    Args:
        tensor: `[rows, …]`.
        before: Rows of each block.
        after: Rows that each shall have.

    Returns:
        The tensor itself where nothing is added.
    """
    if list(before) == list(after):
        return tensor
    blocks = []
    for block, rows in zip(tensor.split(list(before)), after, strict=True):
        blocks += [block, block.new_zeros(rows - len(block), *block.shape[1:])]
    return torch.cat(blocks)
