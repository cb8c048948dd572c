"""Identity of a model: number, hash and ties of its weights, and hash of its configuration."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.storage.layout import weight_files

SAMPLES = 4096
"""Number of values of a tensor that are hashed, about; of a smaller tensor, all are."""
CHUNK = 2**20
"""Number of values that are summed at a time: few enough for the caches of a processor."""
NOT_OF_THE_MODEL = frozenset(("architectures", "auto_map", "dtype", "tie_word_embeddings", "transformers_version"))
"""Keys of a configuration that say where a model comes from and how it is stored, and those that its weights say."""

COMPARED = 64
"""Number of values of a parameter that are compared to see whether it was changed."""


def count_parameters(model: nn.Module) -> int:
    """Number of all parameters, counted from the tensors; shared ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def identity_of(model: PreTrainedModel) -> dict[str, Any]:
    """Say which model this is, to tell it from others wherever it is loaded.

    Args:
        model: A causal language model, on any device; its layers may rest in files. All of its weights are read.

    Returns:
        `model_type`, `parameters` (their number), `configuration` and `weights` (hashes), and `dtype`, as JSON values.
        `weights` is None where accelerate keeps some of them away from the model.
    """
    away = any(parameter.is_meta for parameter in model.parameters())
    return {
        "model_type": model.config.model_type,
        "parameters": count_parameters(model),
        "configuration": configuration_hash(model.config),
        "weights": None if away else weights_hash(model.named_parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def configuration_hash(config: PreTrainedConfig) -> str:
    """Hash what a configuration says of the model: not names, versions, dtype and implementations of attention."""
    fields = {key: value for key, value in config.to_dict().items() if key[0] != "_" and key not in NOT_OF_THE_MODEL}
    if "logits_scaling" in fields:
        fields.pop("logit_scale", None)  # a copy of it, for vLLM
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(named: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, shapes, some values and the sums of all rows of weights.

    The sums are those of the bits in float32, which are exact: they depend neither on the device nor on the dtype, as
    long as it holds the values. They notice a changed value and exchanged rows. Values that change places within a row
    are noticed where they are among the samples, which lie an odd distance apart: not in one column.

    Args:
        named: Weights with their names, in any order; shared ones once.

    Returns:
        Hexadecimal digits.
    """
    lines = sorted(f"{name} {_tensor_hash(tensor)}" for name, tensor in named)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def saved_weights(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Read the weights in files of safetensors one by one, with the names that `named_parameters` gives them.

    Args:
        files: Files of one saved model.

    Yields:
        The name of a tensor, and the tensor.
    """
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)


def saved_hash(directory: Path) -> str:
    """Hash the weights of a saved model, with the names and dtypes of its files.

    Args:
        directory: Directory of the model.

    Returns:
        Hexadecimal digits.

    Raises:
        SavedModelError: The files are damaged or missing.
    """
    try:
        return weights_hash(saved_weights([directory / name for name in weight_files(directory)]))
    except (SafetensorError, OSError) as error:
        raise SavedModelError(f"The weights in {str(directory)!r} are damaged.", "Save the model again.") from error


def _tensor_hash(tensor: Tensor) -> str:
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    tensor = torch.atleast_1d(tensor.detach())
    rows = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor[None]
    some = tensor.flatten()[:: max(1, tensor.numel() // SAMPLES) | 1]
    parts = rows.split(max(1, CHUNK // max(1, rows.shape[1])))
    sums = torch.cat([part.float().view(torch.int32).sum(1, dtype=torch.int64) for part in parts])
    for values in (some.float(), sums):
        digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()


def sampled(model: PreTrainedModel) -> dict[str, Tensor]:
    """Read a few values of each parameter, by name and shape, to see later whether the weights were changed."""
    samples: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        with suppress(NotImplementedError):  # weights in files of a device map, and those of torchao
            some = weight.detach().flatten()[:: max(1, weight.numel() // COMPARED) | 1]
            samples[f"{name} {tuple(weight.shape)}"] = some.clone().cpu()
    return samples


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether values differ in two results of `sampled`; other shapes and a conversion to a dtype are no change."""
    return any(not torch.equal(before[key].to(after[key].dtype), after[key]) for key in before.keys() & after.keys())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embeddings and head share one weight, whatever the configuration says."""
    return bool(model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@torch.inference_mode(mode=False)  # the buffers take part in backward passes
def converted(model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str | None = None) -> PreTrainedModel:
    """Copy a model in another dtype, with the rotary frequencies of the configuration.

    Each tensor is copied to its place at once: the device of the model needs no room for a second one.

    Args:
        model: A model; it is not changed.
        dtype: Dtype of the copy.
        device: Device of the copy; None takes that of the model.

    Returns:
        The copy.
    """
    copies: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        to = dtype if tensor.is_floating_point() else tensor.dtype
        made = tensor.detach().to(device or tensor.device, to, copy=True)
        copies[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    copied = copy.deepcopy(model, copies)
    rebuild_buffers(copied)
    return copied


def rebuild_buffers(model: PreTrainedModel) -> None:
    """Compute rotary frequencies and scales of embeddings in float32, as loading does: from the configuration.

    They are in no checkpoint. `model.to(torch.bfloat16)` rounds them, and some kinds of rotary embedding adapt them to
    the longest text that they have read, so a model in memory may differ from the same model saved and loaded.

    Args:
        model: A model; its buffers are replaced where they are, those on the meta device on that of the model.
    """
    for module in model.modules():
        made: dict[str, Tensor] = {}
        if any(name.endswith("inv_freq") for name in module._buffers):
            fresh: nn.Module = type(module)(module.config)
            made, state = dict(fresh.named_buffers()), vars(module)
            for name in [name for name in state if name.endswith("max_seq_len_cached")]:
                del state[name]
            state.update({name: value for name, value in vars(fresh).items() if name[0] != "_" and name != "training"})
        elif "embed_scale" in module._buffers:
            made = {"embed_scale": torch.tensor(module.scalar_embed_scale, dtype=torch.float32)}
        for name, buffer in made.items():
            before = cast(Tensor, module._buffers[name])
            module._buffers[name] = buffer.to(model.device if before.is_meta else before.device)
