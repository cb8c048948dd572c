"""Weights of a model: their number, and a hash that tells checkpoints apart."""

from __future__ import annotations

import hashlib

from torch import nn
from transformers import PreTrainedModel


def count_parameters(model: nn.Module) -> int:
    """All parameters, counted from the tensors; shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def weights_hash(model: PreTrainedModel) -> str:
    """Tell checkpoints apart without reading them whole: shapes and some values of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{some.tolist()}".encode())
    return digest.hexdigest()
