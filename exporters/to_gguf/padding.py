"""Zero-padding of decoder layers to larger widths, without a change of their outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from selfpruner_hub.models.architectures import architecture_of, block_rows, shape_of
from selfpruner_hub.plans.plan import LayerWidths


def padded_state(
    layer: nn.Module, config: PreTrainedConfig, widths: LayerWidths, target: LayerWidths
) -> dict[str, Tensor]:
    """Pad a decoder layer with zeros: rows of q, k, v, gate and up, columns of o and down.

    The values of an added KV group are zero, and so are the activations of an added channel, silu(0) · 0 for example.
    So the padding adds nothing to the residual stream.

    Args:
        layer: Decoder layer to pad.
        config: Configuration of its model.
        widths: Widths of the layer.
        target: Widths after padding, none smaller than in `widths`.

    Returns:
        The padded tensors by name; a tensor that does not grow is not copied.
    """
    architecture, shape = architecture_of(config), shape_of(config)
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    for projection in architecture.rows:
        before = [block_rows(shape, widths, block) for block in projection.blocks]
        after = [block_rows(shape, target, block) for block in projection.blocks]
        for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
            if name in state:
                by_row, rest = state[name].view(sum(before), -1), state[name].shape[1:]
                state[name] = pad_rows(by_row, before, after).view(-1, *rest)
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
        tensor: Tensor of shape `[rows, …]`.
        before: Number of rows of each block.
        after: Number of rows of each block after padding.

    Returns:
        The padded tensor; the tensor itself where nothing is added.
    """
    if list(before) == list(after):
        return tensor
    blocks = []
    for block, rows in zip(tensor.split(list(before)), after, strict=True):
        blocks += [block, block.new_zeros(rows - len(block), *block.shape[1:])]
    return torch.cat(blocks)
