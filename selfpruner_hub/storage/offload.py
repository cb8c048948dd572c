"""Where large tensors rest: where they are, in the memory of the host, or in files."""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from selfpruner_hub.errors import OutputError


class TensorStore(Protocol):
    """Store of large tensors: a call with a tensor returns the stored tensor, which is used in its place."""

    apart: bool
    """Whether tensors are copied to another place, from which they are read each time; else they stay where they are.
    """

    @property
    def briefly(self) -> TensorStore:
        """Store for what is read again within moments: for that, files are too slow."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """Store a tensor."""


ARENA = 2**28
"""Size of a file or of a block of memory, in bytes; a larger tensor has a larger one."""
RESIDENT = 2**29
"""Limit of the pages of the files that are in memory, in bytes; above it, they are released."""
PAUSE = 0.005
"""Time between two checks of the memory in use, in seconds."""
ALIGNMENT = 64


class Memory:
    """Store that leaves tensors in memory."""

    apart = False

    @property
    def briefly(self) -> TensorStore:
        """This store."""
        return self

    def __call__(self, tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor


MEMORY = Memory()


class _Arenas(ABC):
    """Store that copies tensors into large blocks, one behind the other; a block ends with the last of its tensors."""

    apart = True

    @property
    def briefly(self) -> TensorStore:
        """This store."""
        return self

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arena: mmap.mmap | memoryview | None = None
        self._used = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Store a tensor.

        Args:
            tensor: Tensor of any shape and dtype; its values are copied.

        Returns:
            A tensor with the same values, in the store.

        Raises:
            OutputError: The disk is full, or cannot be written.
        """
        if not tensor.nbytes:
            return tensor
        with self._lock:
            if self._arena is None or self._used + tensor.nbytes > len(self._arena):
                self._arena, self._used = self._opened(max(ARENA, tensor.nbytes)), 0
            arena, offset = self._arena, self._used
            self._used += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        strides = torch.empty_like(tensor, device="meta").stride()  # keep the memory order: last bits depend on it
        # Each has a storage of its own: what shares one is copied when it is saved.
        flat = torch.frombuffer(arena, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
        return flat.as_strided(tensor.shape, strides).copy_(tensor.detach())

    @abstractmethod
    def _opened(self, size: int) -> mmap.mmap | memoryview:
        """A new block of at least so many bytes."""


class HostStore(_Arenas):
    """Store in the memory of the host, for the work of an accelerator: its own memory holds what is worked on.

    Args:
        pinned: Whether the memory is page-locked, so that CUDA copies it several times as fast.
    """

    def __init__(self, *, pinned: bool) -> None:
        super().__init__()
        self._pinned = pinned

    def _opened(self, size: int) -> memoryview:
        if not self._pinned:
            return torch.empty(size, dtype=torch.uint8).numpy().data
        torch.cuda.synchronize()  # copies from a block that has ended, whose memory the new one may take
        # PyTorch takes page-locked memory in powers of two: what is above `size` serves the next tensors.
        whole = 1 << (size - 1).bit_length()
        return torch.empty(whole, dtype=torch.uint8, pin_memory=True).numpy().data


class DiskStore(_Arenas):
    """Store that puts tensors into memory-mapped files; the system loads their pages when they are read.

    Stored tensors are used, and changed, like any others. Before each new tensor, and periodically from a thread, pages
    are released where more than `RESIDENT` bytes are in memory: what was written stays in the files, so this is safe at
    any time. The files have no names and end with the tensors, or with the process.

    Args:
        directory: Directory on a disk with space for the model, its statistics and its pruned copy; created if missing.

    Raises:
        OutputError: The directory cannot be written.
    """

    def __init__(self, directory: str | Path) -> None:
        super().__init__()
        self._directory = Path(directory)
        self._arenas: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._mapped = _resident_files() or 0  # by libraries: those of CUDA take hundreds of megabytes
        self._arena = self._opened(mmap.PAGESIZE)  # fails at once where the directory cannot be written
        threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True).start()

    @property
    def briefly(self) -> TensorStore:
        """Leave them where they are: each would be written to the disk, and deleted."""
        return MEMORY

    def __call__(self, tensor: Tensor) -> Tensor:
        """Store a tensor as `_Arenas` does, after pages are released."""
        self.trim()
        return super().__call__(tensor)

    def trim(self) -> None:
        """Release the pages of the files where more than `RESIDENT` bytes are in memory."""
        resident = _resident_files()
        if resident is None or resident - self._mapped > RESIDENT:
            self.release()

    def release(self) -> None:
        """Release all pages of the files."""
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
    """Reserve the disk space, where the system can: a full disk is an error here, not a signal during a copy."""
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


def _resident_files() -> int | None:
    """Return the bytes of mapped files in memory; None where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[2]) * mmap.PAGESIZE
    except OSError:
        return None
