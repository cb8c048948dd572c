"""A run directory is used by one run at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from selfpruner_hub.errors import OutputError, UserError

LOCK_FILE = ".lock"
"""Name of the file; what a killed process leaves of it locks nothing."""


@contextmanager
def run_lock(directory: Path | None) -> Iterator[None]:
    """Keep a run directory for this run.

    Args:
        directory: Run directory, created if missing; one that was, and is still empty at the end, is deleted. None
            locks nothing.

    Raises:
        UserError: Another run uses the directory.
        OutputError: The directory cannot be written.
    """
    if directory is None:
        yield
        return
    created, path = not directory.exists(), directory / LOCK_FILE
    lock = FileLock(path, timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"Another run uses the run directory {str(directory)!r}.", "Wait until it ends, or use another one."
        ) from error
    except OSError as error:
        raise OutputError(f"Cannot use the run directory {str(directory)!r}: {error.strerror}.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()  # while it is locked: whoever waits for it notices that it is gone
        lock.release()
        if created:
            with contextlib.suppress(OSError):
                directory.rmdir()  # fails where it has files
