"""A run directory, and an output, is used by one run at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from selfpruner_hub.errors import OutputError, UserError

LOCK_FILE = ".lock"
"""Name of the file; the file of a killed process locks nothing."""


@contextmanager
def run_lock(directory: Path | None) -> Iterator[None]:
    """Keep a run directory for this run.

    Args:
        directory: Run directory, created if missing; one that was, and is still empty at the end, is deleted. None
            locks nothing. The thread that has locked a directory may lock it again.

    Yields:
        Nothing.

    Raises:
        UserError: Another run uses the directory.
        OutputError: The directory cannot be written.
    """
    if directory is None:
        yield
        return
    created, path = not directory.exists(), directory / LOCK_FILE
    lock = FileLock(path, timeout=0, is_singleton=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"Another run uses {str(directory)!r}.", "Wait until it ends, or use another one.") from error
    except OSError as error:
        raise OutputError(f"Cannot use {str(directory)!r} for the run: {error.strerror}.") from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                path.unlink()  # while it is locked: whoever waits for it notices that it is gone
        lock.release()
        if created:
            with contextlib.suppress(OSError):
                directory.rmdir()  # fails where it has files


@contextmanager
def output_lock(output: Path, run_dir: Path) -> Iterator[None]:
    """Keep an output and a run directory for one command, until the output is saved.

    Args:
        output: Directory of the result. One that is not there yet is kept by its default run directory, so that it
            appears whole.
        run_dir: Run directory; what is left of the default one is deleted if it is empty.

    Yields:
        Nothing.

    Raises:
        UserError: Another run uses one of the directories.
        OutputError: One of them cannot be written.
    """
    usual = default_run_dir(output)
    with run_lock(run_dir), run_lock(output if output.exists() else usual):
        yield
    if run_dir == usual:
        with contextlib.suppress(OSError):
            run_dir.rmdir()  # fails where it holds other files, which are kept


def default_run_dir(output: Path) -> Path:
    """The run directory of an output for which none is given: beside it."""
    return Path(f"{output.resolve()}.run")
