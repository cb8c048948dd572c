"""What is made once a run, however many processes run its tests side by side."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def made_once(directory: Path, fill: Callable[[Path], object]) -> Path:
    """Return a directory that is filled already, by this process or by another one, or fill it; others wait meanwhile.

    The system frees the lock of a process that dies. What it has left half-made has another name: a directory gets its
    own when it is whole.

    Args:
        directory: The directory; the one above it exists.
        fill: What fills an empty directory.
    """
    with FileLock(f"{directory}.lock"):
        if not directory.exists():
            half = directory.with_name(f"{directory.name}.half")
            shutil.rmtree(half, ignore_errors=True)
            half.mkdir()
            fill(half)
            half.rename(directory)
    return directory
