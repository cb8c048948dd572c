"""Atomic writes: files are written on the file system of their target, then renamed to it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from selfpruner_hub.errors import OutputError
from selfpruner_hub.interrupts import uninterrupted


@contextmanager
def save_directory(directory: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Give a staging directory whose files replace those of `directory` at the end, or are deleted on any error.

    It is inside of `directory` where that exists, which may be a mount point, and beside it otherwise. An interrupt
    (Ctrl-C) waits until the files are all in their place, or all deleted.

    Args:
        directory: Directory that the files are moved to; a symbolic link is followed.
        stale: Patterns of names; what has such a name in `directory`, and is not replaced, is deleted in the same step.

    Yields:
        An empty directory on the same file system.

    Raises:
        OutputError: The directory cannot be written.
    """
    staging = None
    place = Path(os.path.realpath(directory))
    with uninterrupted() as interruptible:
        try:
            if place.exists() and not place.is_dir():
                raise OutputError(f"{str(directory)!r} is a file, not a directory.", "Choose another output.")
            place.parent.mkdir(parents=True, exist_ok=True)
            staging = _made(place if place.exists() else place.parent, place.name)
            staging.chmod(0o755)
            with interruptible():
                yield staging
            for path in staging.iterdir():
                path.chmod(0o755 if path.is_dir() else 0o644)  # some writers leave their files private
            if place.exists():
                _replace(place, staging, stale)
            else:
                staging.rename(place)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise OutputError(f"Cannot write {str(directory)!r}: {reason}.", "Choose another output.") from error
        finally:
            if staging is not None and staging.exists():
                shutil.rmtree(staging, ignore_errors=True)


def _made(parent: Path, name: str) -> Path:
    """Make an empty hidden directory."""
    return Path(tempfile.mkdtemp(dir=parent, prefix=f".{name}."))


def _replace(directory: Path, staging: Path, stale: Sequence[str]) -> None:
    """Move staged files to their place: first all old files of their names, and stale ones, leave, then new ones come.

    Old and new files are never side by side, not even when the process is killed. On any exception the old ones come
    back, and the new ones are in the staging directory again.
    """
    names = sorted(path.name for path in staging.iterdir())
    old = {path.name for path in directory.iterdir() if any(fnmatch(path.name, pattern) for pattern in stale)}
    retired = _made(staging.parent, directory.name)
    try:
        for name in sorted({*names, *old}):
            if os.path.lexists(directory / name):
                (directory / name).rename(retired / name)
        for name in names:
            (staging / name).rename(directory / name)
    except BaseException:
        # The file system says what was done: an interrupt may come between a rename and the next statement.
        for name in names:
            if not os.path.lexists(staging / name):
                (directory / name).rename(staging / name)
        for path in list(retired.iterdir()):
            path.rename(directory / path.name)
        retired.rmdir()
        raise
    shutil.rmtree(retired, ignore_errors=True)


def check_writable(directory: Path) -> None:
    """Check before long work whether its result can be written; no file remains.

    Args:
        directory: Directory of the result; it need not exist.

    Raises:
        OutputError: The directory cannot be written.
    """
    parent = directory
    try:
        while not parent.exists():
            parent = parent.parent
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OutputError(f"Cannot write {str(directory)!r}: {error.strerror}.", "Choose another output.") from error


def output_path(given: str | Path) -> Path:
    """Return the path of a place that is written to.

    Args:
        given: Path of a directory or file; an empty text, such as that of an unset variable, would stand for the
            working directory.

    Returns:
        The path.

    Raises:
        OutputError: The text is empty, or it is no path.
    """
    if not isinstance(given, str | Path) or "\0" in str(given):
        raise OutputError(f"{given!r} is no path of a directory.", "Give its name as text, or a pathlib.Path.")
    if not str(given).strip():
        raise OutputError("The output has no name.", 'Give a directory; the working directory is ".".')
    return Path(given)


def check_replaceable(directory: Path, record: str, overwrite: bool) -> None:
    """Refuse an output whose files are a model that this package did not write.

    Args:
        directory: Directory of the output.
        record: Name of the file that this package writes beside what is replaced.
        overwrite: Whether the user asked for the model to be replaced.

    Raises:
        OutputError: The directory has a config.json without the record, and `overwrite` is not set.
    """
    if not overwrite and (directory / "config.json").exists() and not (directory / record).exists():
        raise OutputError(
            f"{str(directory)!r} holds another model (it has config.json and no {record}), which would be replaced.",
            "Choose another output, or set overwrite=True (--overwrite).",
        )


def write_atomically(path: Path, text: str) -> None:
    """Write a file completely or not at all: temporary file, fsync, rename. An interrupt (Ctrl-C) waits for the end.

    Args:
        path: Path of the file; its directory is created if missing.
        text: New content of the file.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        with uninterrupted():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).chmod(0o644)
                Path(name).replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    Path(name).unlink()
                raise
    except OSError as error:
        raise OutputError(f"Cannot write {str(path)!r}: {error.strerror}.", "Choose another output.") from error
