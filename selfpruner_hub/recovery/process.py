"""The surroundings of a training: random states, logs and memory of its process, and errors of the disk as one line."""

from __future__ import annotations

import ctypes
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers.utils import logging

from selfpruner_hub import ranks
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.models.devices import fork_rng

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt`."""
_LARGEST = 32 << 20
"""Size from which glibc, left alone, asks the system for every block anew at the latest."""


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Let the allocator keep what a step frees: the next one needs as much, and new pages are filled with zeros first.

    That takes an eighth of the time of a step on two cores. Only glibc is told; elsewhere nothing changes.

    Yields:
        Nothing.
    """
    allocator: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(allocator, "mallopt"):
        yield
        return
    for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
        allocator.mallopt(parameter, (1 << 31) - 1)
    try:
        yield
    finally:
        allocator.mallopt(_MMAP_THRESHOLD, _LARGEST)
        allocator.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST)
        allocator.malloc_trim(0)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the global random states, which Trainer sets, let it take a device, and keep transformers quiet and memory.

    Args:
        device: Device of the models.

    Yields:
        Nothing.
    """
    states = random.getstate(), np.random.get_state()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    current = nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index or 0)
    with fork_rng(device), current, keeping_memory():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Turn the errors of writing a checkpoint into one line.

    Args:
        folder: Directory of the checkpoints, created if missing.

    Yields:
        Nothing.

    Raises:
        OutputError: A checkpoint cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
        if isinstance(error, RuntimeError) and not full:  # torch.save raises it where the disk is full
            raise
        raise OutputError(
            f"Cannot write a checkpoint of the recovery in {folder}: {error}.",
            "Make room, or choose another run directory; the same command resumes.",
        ) from error


def check_processes(device: torch.device, identity: str, batch: int, window: int, adapters: bool) -> None:
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
    if ranks.sharded() and adapters:
        raise UserError(
            "Adapters are not trained with FSDP (method=lora, or too little memory for all weights).",
            "Launch it without FSDP (accelerate launch --multi_gpu), on more devices, or set method=full.",
        )
    if rest := batch % ranks.count():
        raise UserError(
            f"A step of {batch} windows cannot be divided over {ranks.count()} processes.",
            f"Set batch_tokens={(batch - rest + ranks.count()) * window}.",
        )
    ranks.check_device(device)
    if ranks.largest(int(ranks.from_first(lambda: identity) != identity), device):
        raise UserError("The processes differ in models or settings.", "Load the same models, whole, in each of them.")
