"""The processes of a run that `torchrun` or `accelerate launch` started, each with a device and the models of its own.

All of them run the same code on one machine. The first one writes the texts, asks, decides and saves; the windows of a
text, or of a step of a training, are divided between all. In a process that was started alone, every function here does
nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate.utils import disable_fsdp_ram_efficient_loading
from torch import Tensor
from torch import distributed as dist

from selfpruner_hub.errors import SelfPrunerError, UserError

T = TypeVar("T")
PATIENCE = timedelta(days=7)
"""Time that a process waits for another one: the first one may write text for hours. The launcher ends all processes
where one fails."""


@contextmanager
def joined(device: str | torch.device | None) -> Iterator[None]:
    """Join the other processes of a launcher, where there are any, and take the device of this process.

    Args:
        device: Device that was asked for; unless it is the CPU, each process takes an accelerator of its own, if the
            machine has any.

    Yields:
        Nothing.

    Raises:
        UserError: There are more processes than devices, or the launcher was told to use FSDP1.
        SelfPrunerError: Another process has ended too early.
    """
    if "LOCAL_RANK" in os.environ and not dist.is_initialized():
        _join(device)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise SelfPrunerError("Another process has ended.", "It says why; the same command resumes.") from error
        raise


def check_device(device: torch.device) -> None:
    """Refuse models that are not on the device of their process.

    Args:
        device: Device of the models of this process.

    Raises:
        UserError: They are on another one, which belongs to another process.
    """
    if device.type != "cpu" and count() > 1 and device.index != torch.accelerator.current_device_index():
        raise UserError(
            f"A process has its models on {device}, not on the device of its own.",
            "Call init_process_group and choose the device before they are loaded, or leave out the device.",
        )


def leave() -> None:
    """Part from the other processes, at the end of this one; after an error, that could wait for them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(device: str | torch.device | None) -> None:
    if _uses_fsdp() and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("Recovery is not divided by FSDP1.", "Set fsdp_version: 2 in the configuration of accelerate.")
    disable_fsdp_ram_efficient_loading()  # it would leave the parent without weights in all processes but the first
    backend, devices = "gloo", torch.accelerator.device_count()
    if devices and str(device) != "cpu":
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > devices:
            raise UserError(f"There are more processes than devices, {devices}.", f"Use --num_processes {devices}.")
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
        kind = torch.accelerator.current_accelerator()
        backend = f"cpu:gloo,{kind}:{dist.get_default_backend_for_device(kind)}"
    dist.init_process_group(backend, timeout=PATIENCE)


def count() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes, measures and saves."""
    return rank() == 0


def share(length: int, block: int = 1) -> slice:
    """The part of some windows that this process reads.

    Args:
        length: Number of windows.
        block: Number of windows that stay together; every part but the last has whole blocks.

    Returns:
        Place of the part.

    Raises:
        UserError: There are fewer blocks than processes.
    """
    blocks = -(-length // block)
    if blocks < count():
        raise UserError(
            f"{length} windows of text cannot be divided over {count()} processes.",
            f"Use more text, or {blocks} process{'es' * (blocks > 1)}.",
        )
    first, last = (block * (blocks * number // count()) for number in (rank(), rank() + 1))
    return slice(first, min(last, length))


def total(*tensors: Tensor) -> None:
    """Add up tensors over the processes, in place.

    Args:
        *tensors: Tensors of the same shapes and dtypes in all processes.
    """
    if count() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def added(value: float) -> float:
    """Add up a number over the processes; it is the same in all of them."""
    if count() == 1:
        return value
    total_value = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total_value)
    return total_value.item()


def mean(value: float, weight: int) -> float:
    """Average means over the processes, weighted by what each is of; it is the same in all of them."""
    return value if count() == 1 else added(value * weight) / added(weight)


def owns(index: int) -> bool:
    """Whether this process works on a layer alone, for all."""
    return index % count() == rank()


def from_owner(index: int, make: Callable[[], Tensor], like: Tensor) -> Tensor:
    """Let the process that owns a layer make a tensor, and give it to all.

    Args:
        index: Index of the layer.
        make: Function that makes it; only its owner calls it.
        like: Tensor of the same shape, dtype and device; it may be a view that takes no memory.

    Returns:
        The tensor.
    """
    if count() == 1:
        return make()
    tensor = make().contiguous() if owns(index) else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    dist.broadcast(tensor, index % count())
    return tensor


def gathered(value: T) -> list[T]:
    """What each process gives, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def sharded() -> bool:
    """Whether the launcher was told to divide the weights that are trained between the processes (FSDP2)."""
    return dist.is_initialized() and _uses_fsdp()


def from_first(make: Callable[[], T]) -> T:
    """Let the first process make something, and give it to all.

    Args:
        make: Function that makes it; only the first process calls it.

    Returns:
        What it returned.

    Raises:
        SelfPrunerError: The function raised it. The others raise its message, as a `UserError` if it was one.
    """
    if count() == 1:
        return make()
    made: list[Any] = [None, None]
    failure: SelfPrunerError | None = None
    if is_first():
        try:
            made[0] = make()
        except SelfPrunerError as error:
            failure = error
            made[1] = isinstance(error, UserError), error.message, error.hint
    dist.broadcast_object_list(made)
    if made[1] is not None:
        is_mistake, *message = made[1]
        raise failure or (UserError if is_mistake else SelfPrunerError)(*message)
    return made[0]


def averaged(values: Tensor) -> Tensor:
    """Average values over the processes, in place.

    Args:
        values: Tensor on the device of this process.

    Returns:
        The tensor.
    """
    if count() > 1:
        dist.all_reduce(values)
        values /= count()
    return values


def largest(value: int, device: torch.device) -> int:
    """Take the largest of the numbers that the processes give.

    Args:
        value: Number of this process.
        device: Device of this process.

    Returns:
        The largest one, the same in all.
    """
    if count() == 1:
        return value
    maximum = torch.tensor(value, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def spread(tensors: Iterable[Tensor]) -> None:
    """Copy tensors of the first process into those of the others.

    Args:
        tensors: Tensors of the same shapes and dtypes in all processes.
    """
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def _uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
