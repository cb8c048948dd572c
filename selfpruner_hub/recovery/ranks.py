"""The processes of a recovery that `accelerate launch` or `torchrun` started, each with a device of its own.

All of them run the same code. The first one writes the texts, decides and saves; a step is divided between all. In a
process that was started alone, every function here does nothing.
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
            raise SelfPrunerError(
                "Another process of the recovery has ended.", "It says why; the same command resumes."
            ) from error
        raise


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


def is_first() -> bool:
    """Whether this is the process that writes, measures and saves."""
    return not dist.is_initialized() or dist.get_rank() == 0


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
        is_mistake, *told = made[1]
        raise failure or (UserError if is_mistake else SelfPrunerError)(*told)
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
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def spread(tensors: Iterable[Tensor]) -> None:
    """Copy tensors of the first process into those of the others.

    Args:
        tensors: Tensors of the same shapes and dtypes in all processes.
    """
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), 0)


def check(device: torch.device, identity: str, batch: int, window: int, adapters: bool) -> None:
    """Refuse what several processes cannot do together.

    Args:
        device: Device of the models of this process.
        identity: What must be the same in all processes, as text.
        batch: Windows of a step, of all processes.
        window: Tokens of a window.
        adapters: Whether adapters are trained in place of all weights.

    Raises:
        UserError: Adapters are to be trained with FSDP, a step cannot be divided, or the processes do not fit together.
    """
    if sharded() and adapters:
        raise UserError(
            "Adapters are not trained with FSDP (method=lora, or too little memory for all weights).",
            "Launch it without FSDP (accelerate launch --multi_gpu), on more devices, or set method=full.",
        )
    if rest := batch % count():
        raise UserError(
            f"A step of {batch} windows cannot be divided over {count()} processes.",
            f"Set batch_tokens={(batch - rest + count()) * window}.",
        )
    if device.type != "cpu" and count() > 1 and device.index != torch.accelerator.current_device_index():
        raise UserError(f"A process has its models on {device}, not on the device of its own.", "Leave out the device.")
    if largest(int(from_first(lambda: identity) != identity), device):
        raise UserError("The processes differ in models or settings.", "Load the same models, whole, in each of them.")


def _uses_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
