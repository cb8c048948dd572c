"""The weights that are trained: a float32 copy of a model, or adapters on it."""

from __future__ import annotations

import copy
import importlib.util
import math
from typing import Any, cast

import psutil
import torch
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from selfpruner_hub import ranks
from selfpruner_hub.errors import MissingExtraError
from selfpruner_hub.models.devices import free_memory
from selfpruner_hub.recovery.settings import RecoverySettings

FULL_BYTES = 16
"""Bytes for each weight that is trained: float32 value, gradient and two moments of AdamW."""
COPY_BYTES = 4
"""Bytes for each weight of the float32 copy, which every process holds whole until it is divided between them."""
USABLE_MEMORY = 0.8
"""Share of the free memory that may be planned with; activations and logits take the rest."""


def uses_adapters(model: PreTrainedModel, settings: RecoverySettings) -> bool:
    """Decide whether adapters are trained in place of all weights.

    Args:
        model: The pruned model.
        settings: Settings of recovery.

    Returns:
        Whether they are; for `auto`, whether all weights with their optimiser do not fit into memory, or the share of
        one process into its memory where FSDP divides them.

    Raises:
        MissingExtraError: They are, and PEFT is not installed.
    """
    adapters = settings.method == "lora"
    if settings.method == "auto":
        free = free_memory(model.device)
        if math.isinf(free):  # a CPU, whose memory all processes share, or a GPU that shares that of the CPU (MPS)
            free = psutil.virtual_memory().available / ranks.count()
        share = 1 / ranks.count() if ranks.sharded() else 1
        adapters = max(FULL_BYTES * share, COPY_BYTES * (1 + share)) * model.num_parameters() > USABLE_MEMORY * free
    if adapters and importlib.util.find_spec("peft") is None:
        raise MissingExtraError("peft", "recover")
    return adapters


def trainable(model: PreTrainedModel, settings: RecoverySettings, adapters: bool) -> nn.Module:
    """Copy a model for training.

    Args:
        model: The pruned model; it is left as it is.
        settings: Settings of recovery.
        adapters: Whether adapters are trained.

    Returns:
        A copy with float32 weights, or a PEFT model with adapters on all linear layers of the decoder.
    """
    student = copy.deepcopy(model)
    if not adapters:
        for parameter in student.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return student
    from peft import LoraConfig, get_peft_model

    rank = settings.rank
    wanted: Any = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(student, wanted)


@torch.no_grad()
def whole(student: nn.Module, like: PreTrainedModel) -> nn.Module:
    """Gather weights that FSDP divides between processes; all of them call it.

    Args:
        student: Result of `trainable`, in training.
        like: The pruned model that it began as.

    Returns:
        A copy of the pruned model with the weights of the student, in the dtype of each weight before; the student
        itself where its weights are whole.
    """
    weights = fsdp2_canonicalize_names(dict(student.named_parameters()))
    if not any(isinstance(weight, DTensor) for weight in weights.values()):
        return student
    made = copy.deepcopy(like)
    for name, parameter in made.named_parameters():
        parameter.copy_(cast(DTensor, weights[name]).full_tensor())
    return made


def finished(student: nn.Module, like: PreTrainedModel) -> PreTrainedModel:
    """Turn what was trained into a model of the same kind as before.

    Args:
        student: Result of `trainable`, after training.
        like: The pruned model that it began as.

    Returns:
        The model in eval mode, with adapters merged, in the dtype of each weight before. Buffers stay as they are.
    """
    model: Any = whole(student, like)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):  # accelerate wraps the pass in autocast
        vars(model).pop(name, None)
    model.config.use_cache, model.config.dtype = like.config.use_cache, like.config.dtype  # Trainer sets its own
    before = dict(like.named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(before[name].dtype)
        parameter.grad = None
        parameter.requires_grad_(before[name].requires_grad)
    return cast(PreTrainedModel, model.eval())


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """Dtype of the products: bfloat16, or float32 for a model whose weights are float32."""
    return torch.float32 if model.dtype == torch.float32 else torch.bfloat16
