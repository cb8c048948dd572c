"""Decoder layers whose weights rest in host memory or in files; each is on the device only while it works."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.mixtures.files import Place, StockNames
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.models.weights import is_tied
from selfpruner_hub.storage.offload import TensorStore


@contextmanager
def placed(module: nn.Module, device: torch.device, *, changed: bool = False) -> Iterator[None]:
    """Use copies of a module's weights on a device temporarily; weights that are there already are used themselves.

    Args:
        module: A decoder layer, or a part of one.
        device: Device to work on.
        changed: Whether the work changes the weights, so that they are copied back at the end.
    """
    resting: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for owner in module.modules():
            for tensors in cast(Sequence[dict[str, Any]], (owner._parameters, owner._buffers)):
                for name, tensor in tensors.items():
                    if tensor is None or tensor.device == device:
                        continue
                    copy = to_device(tensor.detach(), device)
                    resting.append((tensors, name, tensor))
                    tensors[name] = (
                        nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
                    )
        yield
    finally:
        for tensors, name, tensor in resting:
            if changed:
                tensor.data.copy_(tensors[name].data)
            tensors[name] = tensor


def on(device: torch.device, batches: Iterable[Iterable[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """Yield batches of stored tensors on the device that works on them, one batch at a time."""
    for batch in batches:
        yield tuple(to_device(tensor, device) for tensor in batch)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from page-locked memory, this process does not wait for it."""
    return tensor.to(device, non_blocking=device.type == "cuda" and tensor.is_pinned())


def stream_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Put a model on a device without its decoder layers; each of them is there only while it runs.

    Embeddings, last norm and head stay on the device, so it is `model.device`.

    Args:
        model: A causal language model; the weights of its layers stay where they are.
        device: Device that the model runs on.
    """
    layers, inputs, outputs = decoder_layers(model), model.get_input_embeddings(), model.get_output_embeddings()
    tied = is_tied(model)
    with with_layers(model, nn.ModuleList()):
        cast(nn.Module, model).to(device)
    if tied:
        outputs.weight = inputs.weight  # not every device keeps them one
    for layer in layers:
        if not isinstance(layer, _RunsWithInput):
            # Candidates are built by the class of the dense layer. mypy takes a class for its instances.
            layer.__class__ = _streamed(type(layer))  # type: ignore[arg-type]


class _RunsWithInput(nn.Module):
    """A decoder layer that runs on the device of its input, wherever its weights are."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        with placed(self, hidden.device):  # no hooks, which an interrupt would skip
            return super().forward(*args, **kwargs)


@cache
def _streamed(kind: Any) -> type[nn.Module]:
    return type(kind.__name__, (_RunsWithInput, kind), {})


def streams(model: PreTrainedModel) -> bool:
    """Whether `stream_layers` was called for a model."""
    return isinstance(decoder_layers(model)[0], _RunsWithInput)


@contextmanager
def streamed(model: PreTrainedModel) -> Iterator[None]:
    """Let layers whose weights are on the device of the model take others, which rest elsewhere, as they run."""
    stream_layers(model, model.device)
    try:
        yield
    finally:
        settle_layers(model)


def settle_layers(model: PreTrainedModel) -> None:
    """Undo `stream_layers`: move all decoder layers to the device of the model, to stay there."""
    for layer in decoder_layers(model):
        layer.to(model.device)
        if isinstance(layer, _RunsWithInput):
            layer.__class__ = type(layer).__mro__[2]


def from_files(
    config: PreTrainedConfig,
    files: Iterable[Path],
    store: TensorStore,
    device: torch.device,
    dtype: torch.dtype | None,
    renaming: Mapping[str, str],
    **options: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """Build a model whose weights are read one by one, each moved to a store; each layer is on the device as it runs.

    Args:
        config: Configuration of the model.
        files: Files of safetensors.
        store: Store for the weights.
        device: Device to run on.
        dtype: Dtype of the weights; None keeps that of the files.
        renaming: Pattern of a weight's name in the files → what stands in its place in the model's name.
        **options: Keywords of `from_config`.

    Returns:
        The model, and the names of the weights that no file has.

    Raises:
        ModelError: A weight has another shape than the configuration says.
    """
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    names = StockNames(config.model_type)
    read: dict[str, set[Place | None]] = defaultdict(set)
    for file in files:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
        for key in keys:
            name, place = names(_renamed(key, renaming))
            with safe_open(file, "pt") as opened:  # reopened each time: read data stay in memory
                if _put(model, name, opened.get_tensor(key), dtype, store, place):
                    read[name].add(place)
    missing = {key for key, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    missing |= {key for key, _ in model.named_buffers() if key in model.state_dict() and key not in read}
    for name, places in read.items():
        if some := next(filter(None, places), None):
            whole = model.get_parameter(name)
            missing |= {name} if len(places) < len(whole) * some.parts else set()
    model.tie_weights(missing_keys=missing)
    stream_layers(model, device)
    return model, missing


def _renamed(key: str, renaming: Mapping[str, str]) -> str:
    """The name of a weight after the first pattern that it matches."""
    for pattern, target in renaming.items():
        renamed, count = re.subn(pattern, target, key)
        if count:
            return renamed
    return key


def _put(
    model: PreTrainedModel,
    key: str,
    tensor: Tensor,
    dtype: torch.dtype | None,
    store: TensorStore,
    place: Place | None = None,
) -> bool:
    """Put a weight where the model has it, or a part of one; return whether it has it."""
    owner, _, leaf = key.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return False  # weights without a module are ignored, as in from_pretrained
    tensors: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
    expected = None if leaf in module._non_persistent_buffers_set else tensors.get(leaf)
    if expected is None:
        return False
    try:
        fits = (expected if place is None else place.of(expected)).shape == tensor.shape
    except IndexError:  # an expert too many
        fits = False
    if not fits:
        raise ModelError(
            f"The weights of the model do not fit its configuration (first {key}).",
            "Give a Hub repository, or a directory that `save_pretrained` wrote.",
        )
    exact = any(part in key for part in getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    to = torch.float32 if exact else dtype or tensor.dtype
    if tensors is module._buffers:
        tensors[leaf] = tensor.to(expected.dtype)
    elif place is None:
        tensors[leaf] = nn.Parameter(store(tensor.to(to)))
    else:
        if expected.is_meta:
            tensors[leaf] = nn.Parameter(store(torch.empty(expected.shape, dtype=to)))
        place.of(tensors[leaf].data).copy_(tensor)
    return True
