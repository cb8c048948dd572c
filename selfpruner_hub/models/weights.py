"""Count the weights of a model, and hash them to tell checkpoints apart."""

from __future__ import annotations

import hashlib

from torch import nn
from transformers import PreTrainedModel


def count_parameters(model: nn.Module) -> int:
    """Number of all parameters, counted from the tensors; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_hash(model: PreTrainedModel) -> str:
    """Hash names, shapes and some values of all parameters, to tell checkpoints apart without reading all values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{some.tolist()}".encode())
    return digest.hexdigest()
