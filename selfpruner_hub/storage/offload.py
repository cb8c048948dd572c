"""Tensors in files instead of memory: what a model larger than memory is pruned with."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from selfpruner_hub.errors import OutputError


class TensorStore(Protocol):
    """Where large tensors are put: called with one, it returns the one to use instead."""

    on_disk: bool
    """Whether they leave memory."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Put a tensor away."""


ARENA = 2**28
"""Bytes of a file, but for tensors that are larger."""
RESIDENT = 2**29
"""Bytes of the files that may be in memory before their pages are given back."""
PAUSE = 0.005
"""Seconds between two looks at what is in memory."""
ALIGNMENT = 64


class Memory:
    """Keeps tensors as they are."""

    on_disk = False

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor


MEMORY = Memory()


class DiskStore:
    """Puts tensors into files that are mapped into memory, so that the system brings their pages in as they are read.

    They are used, and changed, like any others. Before each new tensor, and now and then by a thread, pages are given
    back where many are in memory: what was written stays in the files, so this is safe at any time. The
    files have no names and end with the tensors, or with the process.

    Args:
        directory: On a disk with room for the model, its statistics and its pruned copy; created where it is missing.

    Raises:
        OutputError: It cannot be written.
    """

    on_disk = True

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        self._lock = threading.Lock()
        self._arenas: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._arena: mmap.mmap | None = None
        self._used = 0
        self._arena = self._opened(mmap.PAGESIZE)  # a directory that cannot be written is told at once
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    def __call__(self, tensor: Tensor) -> Tensor:
        """Put a tensor away.

        Args:
            tensor: Any; its values are copied.

        Returns:
            The same values, in a file.

        Raises:
            OutputError: The disk is full, or cannot be written.
        """
        if not tensor.nbytes:
            return tensor
        self.trim()
        with self._lock:
            if self._arena is None or self._used + tensor.nbytes > len(self._arena):
                self._arena, self._used = self._opened(max(ARENA, tensor.nbytes)), 0
            arena, offset = self._arena, self._used
            self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        strides = torch.empty_like(tensor, device="meta").stride()  # solvers give columns; their last bits depend on it
        flat = torch.frombuffer(arena, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.as_strided(tensor.shape, strides).copy_(tensor.detach())

    def trim(self) -> None:
        """Give back what is in memory of the files, where it is more than `RESIDENT`."""
        if _resident_files() > RESIDENT:
            self.release()

    def release(self) -> None:
        """Give back what is in memory of the files."""
        for arena in list(self._arenas):
            arena.madvise(mmap.MADV_DONTNEED)

    def _opened(self, size: int) -> mmap.mmap:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._directory) as file:
                _allocate(file.fileno(), size)
                arena = mmap.mmap(file.fileno(), size)
        except OSError as error:
            raise OutputError(
                f"Cannot keep tensors in {str(self._directory)!r}: {error.strerror}.", "Choose a disk with more room."
            ) from error
        self._arenas.add(arena)
        return arena


def _allocate(file: int, size: int) -> None:
    """Reserve the room, where the system can: a full disk is told here, not by a signal in the middle of a copy."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.truncate(file, size)


def _watch(store: weakref.ref[DiskStore]) -> None:
    pause = threading.Event()
    while not pause.wait(PAUSE):
        alive = store()
        if alive is None:
            return
        alive.trim()
        del alive


def _resident_files() -> int:
    """Bytes of mapped files in memory; all that can be, where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return RESIDENT + 1
