"""Optimisation profiles: the input sizes that TensorRT builds kernels for, in an engine or behind ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.plan import ModelShape

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, usual and largest shape of an input."""


@dataclass(frozen=True)
class Profile:
    """Sizes of the inputs in one phase, prefill or decode; each is (smallest, usual, largest)."""

    name: str
    batch: tuple[int, int, int]
    length: tuple[int, int, int]
    """Number of new tokens."""
    past: tuple[int, int, int]
    """Number of tokens in the cache."""
    logit_positions: tuple[int, int, int]
    """Number of positions that get logits."""
    context: int
    """Largest number of tokens in the cache after the pass."""

    def input_shapes(self, shape: ModelShape) -> dict[str, Shapes]:
        """Compute the shapes of all inputs of a model's graph.

        Args:
            shape: Shape of the model.

        Returns:
            For each input, by name, its smallest, usual and largest shape.
        """
        total = (1, self.length[1] + self.past[1], self.context)
        inputs = {
            "input_ids": _shapes(self.batch, self.length),
            "attention_mask": _shapes(self.batch, total),
            "position_ids": _shapes(self.batch, self.length),
            "logits_to_keep": _shapes(self.logit_positions),
        }
        for index, layer in enumerate(shape.dense.layers):
            for what in ("keys", "values"):
                inputs[f"input.cache.layers.{index}.{what}"] = _shapes(
                    self.batch, layer.num_key_value_heads, self.past, shape.head_dim
                )
        return inputs


def profiles(batch: int, context: int) -> tuple[Profile, Profile]:
    """Make the profiles of prefill and decode.

    Args:
        batch: Largest number of sequences at a time, at least 1.
        context: Largest number of tokens of a sequence, at least 2.

    Returns:
        Prefill: many new tokens, usually after an empty cache. Decode: one new token after a long cache.

    Raises:
        UserError: A size is not a whole number in its range.
    """
    for name, value, least in (("batch", batch, 1), ("context", context, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    sequences, half, one = (1, batch, batch), context // 2, (1, 1, 1)
    return (
        Profile("prefill", sequences, (1, half, context), (0, 0, context - 1), (1, 1, context), context),
        Profile("decode", sequences, one, (0, half, context - 1), one, context),
    )


def tensorrt_provider(
    directory: Path, cache: Path, *, batch: int = 1, context: int = 2048, device: int = 0
) -> tuple[str, dict[str, Any]]:
    """Configure TensorRT as a provider of ONNX Runtime, with a cache of its engines on disk.

    Example:
        >>> provider = tensorrt_provider(Path("smollm2-b30-onnx"), Path("engines"))
        >>> model = OnnxCausalLM.from_pretrained("smollm2-b30-onnx", providers=[provider, "CUDAExecutionProvider"])

    Args:
        directory: Directory of an ONNX export with `fusions="none"`: TensorRT lacks ONNX Runtime's own operators.
        cache: Directory for engines and timings.
        batch: Largest number of sequences at a time, at least 1.
        context: Largest number of tokens of a sequence, at least 2.
        device: Index of the GPU.

    Returns:
        The provider and its options, as `OnnxCausalLM.from_pretrained` takes them.

    Raises:
        UserError: A size is out of range.
    """
    shape = shape_of(AutoConfig.from_pretrained(directory))
    prefill, _ = profiles(batch, context)  # its range includes all shapes of decode
    names = ("min", "opt", "max")
    texts: dict[str, list[str]] = {name: [] for name in names}
    for key, shapes in prefill.input_shapes(shape).items():
        for name, sizes in zip(names, shapes, strict=True):
            texts[name].append(f"{key}:{'x'.join(map(str, sizes))}")
    return "TensorrtExecutionProvider", {
        "device_id": device,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": str(cache),
        **{f"trt_profile_{name}_shapes": ",".join(texts[name]) for name in names},
    }


def _shapes(*axes: int | tuple[int, int, int]) -> Shapes:
    smallest, usual, largest = (tuple(a if isinstance(a, int) else a[i] for a in axes) for i in range(3))
    return smallest, usual, largest
