"""Zero-padding of FFNs to larger widths, without a change of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from selfpruner_hub.models.architectures import architecture_of


def padded_state(layer: nn.Module, config: PreTrainedConfig, width: int, target: int) -> dict[str, Tensor]:
    """Pad the FFN of a decoder layer with zeros: rows of gate_proj and up_proj, columns of down_proj.

    The activation of an added channel is zero, silu(0) · 0 for example. So the padding adds nothing to the residual
    stream.

    Args:
        layer: Decoder layer to pad.
        config: Configuration of its model.
        width: Width of its FFN.
        target: Width after padding, at least `width`.

    Returns:
        All tensors of the layer by name; a tensor that does not grow is not copied.
    """
    architecture = architecture_of(config)
    state = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    if width == target:
        return state
    for projection in architecture.ffn_inputs:
        for name in (f"{projection.path}.weight", f"{projection.path}.bias"):
            if name in state:
                blocks = state[name].unflatten(0, (len(projection.blocks), width))
                added = blocks.new_zeros(len(blocks), target - width, *blocks.shape[2:])
                state[name] = torch.cat([blocks, added], 1).flatten(0, 1)
    down = f"{architecture.ffn_output}.weight"
    state[down] = nn.functional.pad(state[down], (0, target - width))
    return state
