"""Devices and dtypes: where and how a model is loaded, memory, limits of a device, precision of products."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.errors import ModelError, UserError

logger = logging.getLogger(__name__)

_NVIDIA = Path("/dev/nvidia0")
"""Stands where the driver of a GPU is loaded."""
WITH_FLOAT64 = ("cpu", "cuda")
"""Types of devices that sum in float64; Apple's GPUs (mps) have no float64, and other devices are not known to."""
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "Unable to allocate")
"""Parts of the messages of allocators: of CUDA, ROCm, XPU and MPS, of PyTorch on a CPU, and of NumPy."""


def choose_device(name: str | torch.device | None = None) -> torch.device:
    """Return the device to load a model on.

    Args:
        name: Device, such as `"cpu"`, `"cuda"`, `"cuda:1"` or `"mps"`; None takes the accelerator of this machine, or
            the CPU where there is none.

    Returns:
        The device; an accelerator without an index is the current one.

    Raises:
        UserError: This machine has no such device.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if here is not None else 0
    if name is None:
        if here is None:
            _warn_of_unseen_gpu()
            return torch.device("cpu")
        return torch.device(here.type, torch.accelerator.current_device_index())
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError):  # no word for a device, no text, a number beyond all
        device = None
    if device is not None and device.type == "cpu":
        return torch.device("cpu")
    if device is None or here is None or device.type != here.type or (device.index or 0) >= count:
        names = ["cpu", *([] if here is None else [f"{here.type}:{index}" for index in range(count)])]
        raise UserError(f"There is no device {str(name)!r} here.", f"Choose one of: {', '.join(names)}.")
    return device if device.index is not None else torch.device(here.type, torch.accelerator.current_device_index())


@cache
def _warn_of_unseen_gpu() -> None:
    """Say once that there is an NVIDIA GPU which PyTorch does not see."""
    if _NVIDIA.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        built = f"for CUDA {torch.version.cuda}: the driver may be older" if torch.version.cuda else "for CPUs alone"
        logger.warning(
            "There is an NVIDIA GPU here, and PyTorch does not see it, so the CPU is used. This PyTorch is built %s "
            "(https://pytorch.org/get-started/locally); --device cpu hides this line.",
            built,
        )


def dtype_of(asked: Any) -> Any:
    """Return the dtype to load a model in.

    Args:
        asked: Dtype or its name; None and `"auto"` take that of the checkpoint.

    Returns:
        The dtype, or `"auto"`.

    Raises:
        UserError: There is no such dtype, or it does not hold floating-point numbers.
    """
    if asked in (None, "auto"):
        return "auto"
    dtype = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"A model cannot be loaded in dtype {asked!r}.", "Choose auto, float32, bfloat16 or float16.")
    return dtype


def refuse_float16(dtype: Any) -> None:
    """Raise if a model is to be pruned in float16.

    Values above 65504 are infinite in it, which the activations of a cut model may pass although those of the dense
    model do not. A run would find that out in its last stage.

    Args:
        dtype: Dtype of the model.

    Raises:
        ModelError: It is float16.
    """
    if dtype == torch.float16:
        raise ModelError(
            "A model cannot be pruned in float16, whose range may be too small for a cut model.",
            "Prune it in bfloat16, which takes the same memory, or in float32, which keeps every bit: dtype=bfloat16 "
            "(--dtype), or model.to(torch.bfloat16). The pruned model may be converted back.",
        )


def dtype_to_prune_in(name: str, asked: Any, checkpoint: Any) -> Any:
    """Choose the dtype to prune a checkpoint in: its own, or bfloat16 in place of float16, in a line that says so.

    Args:
        name: Name of the model, for the line.
        asked: Dtype that was asked for; `"auto"` takes that of the checkpoint.
        checkpoint: Dtype of the checkpoint, or its name; None if it is not known.

    Returns:
        The dtype, or `"auto"`.

    Raises:
        ModelError: float16 was asked for.
    """
    refuse_float16(asked)
    if asked != "auto" or dtype_of(checkpoint) != torch.float16:
        return asked
    logger.warning(
        "%s is in float16, whose range may be too small for a cut model: it is pruned and saved in bfloat16, which "
        "rounds its weights to 8 bits in place of 11. dtype=float32 (--dtype) keeps every bit, in twice the memory.",
        name,
    )
    return torch.bfloat16


def check_one_device(model: PreTrainedModel) -> None:
    """Check that all weights of a model are on one device.

    Args:
        model: A model.

    Raises:
        ModelError: They are on several, or some are offloaded.
    """
    devices = {str(parameter.device).replace("meta", "disk") for parameter in model.parameters()}
    if len(devices) > 1 or "disk" in devices:
        raise ModelError(
            f"The model is spread over {', '.join(sorted(devices))}; pruning needs it on one device.",
            "Leave out device_map and choose a device: whole models run on one with room for them, and with "
            "offload_folder (--offload), one layer at a time is on it.",
        )


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where the CPU multiplies it natively, else float32 (emulated bfloat16 is slower)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def described(model: PreTrainedModel) -> str:
    """Name the device and the dtype of a model, such as `cuda:0 (NVIDIA A100-SXM4-80GB), bfloat16`."""
    device, name = model.device, ""
    if device.type == "cuda":
        name = f" ({torch.cuda.get_device_name(device)})"
    return f"{device}{name}, {str(model.dtype).removeprefix('torch.')}"


def free_memory(device: torch.device) -> float:
    """Free memory of an accelerator in bytes; infinite where it is not known, as for a CPU.

    What PyTorch keeps of freed tensors counts as free: the next ones take it.
    """
    if device.type != "cuda":
        return float("inf")
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(torch.cuda.mem_get_info(device)[0] + cached)


def summed(values: Tensor) -> float:
    """Sum in float64; values of a device that has none are summed on the CPU."""
    if values.device.type not in WITH_FLOAT64:
        values = values.cpu()
    return values.sum(dtype=torch.float64).item()


def out_of_memory(error: BaseException, what: str = "") -> ModelError | None:
    """Turn an error of an allocator into one line with a remedy.

    Args:
        error: Any error; its causes are looked at too.
        what: Name of the model, where it was being loaded.

    Returns:
        The error to raise; None if memory was not the cause.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, (torch.OutOfMemoryError, MemoryError)) or (
            isinstance(cause, RuntimeError) and any(text in str(cause) for text in _OUT_OF_MEMORY)
        ):
            return ModelError(
                f"Out of memory{f' while {what!r} was loaded' if what else ''}.",
                "Try dtype=bfloat16 (--dtype), another device (--device cpu), or offload_folder (--offload); a shorter "
                "window takes less memory too.",
            )
        cause = cause.__cause__ or cause.__context__
    return None


def fork_rng(device: torch.device) -> Any:
    """Keep the global random states of the CPU and of this device as they are while the context lasts."""
    accelerated = device.type != "cpu"
    kind = device.type if accelerated else "cuda"
    return torch.random.fork_rng(devices=[device.index or 0] if accelerated else [], device_type=kind)


@contextmanager
def ieee_products(cpu: str = "ieee", cuda: str = "ieee") -> Iterator[None]:
    """Keep the factors of float32 products, factorisations and solves from being rounded temporarily.

    `torch.set_float32_matmul_precision("high")` and `"medium"`, or TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the
    environment, round them to TF32 or bfloat16 in the whole process: too coarse for least squares.

    Args:
        cpu: Precision of the factors on a CPU, `"ieee"` or `"bf16"`.
        cuda: Precision of the factors on an NVIDIA GPU, `"ieee"` or `"tf32"`.

    Yields:
        Nothing.
    """
    settings: Any = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [each.fp32_precision for each in settings]
    try:
        for each, precision in zip(settings, (cpu, cuda), strict=True):
            each.fp32_precision = precision
        yield
    finally:
        for each, precision in zip(settings, before, strict=True):
            each.fp32_precision = precision
