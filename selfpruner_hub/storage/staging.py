"""Where a saved model's files are, and how they get there: staged beside their place, then renamed into it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from selfpruner_hub.errors import OutputError
from selfpruner_hub.models.loading import explain

PLOTS = "plots"
EXPORTS = ("onnx", "tensorrt", "openvino", "gguf", "padded")
"""Folders of a published model: pictures of its search, and exports, each named after its format."""


@contextmanager
def save_directory(directory: Path) -> Iterator[Path]:
    """Give a staging directory whose files replace those of `directory` at the end, or vanish on any error.

    Args:
        directory: Where the files shall be.

    Yields:
        An empty directory on the same file system.

    Raises:
        OutputError: The place cannot be written.
    """
    staging = None
    try:
        if directory.exists() and not directory.is_dir():
            raise OutputError(f"{str(directory)!r} is a file, not a directory.", "Choose another output.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        if directory.exists():
            tempfile.TemporaryFile(dir=directory).close()  # fail now rather than after the work
        staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        staging.chmod(0o755)
        yield staging
        for path in staging.iterdir():
            path.chmod(0o755 if path.is_dir() else 0o644)  # some writers leave their files private
        if not directory.exists():
            staging.rename(directory)
            return
        for path in sorted(staging.iterdir()):
            target = directory / path.name
            if target.is_dir():
                shutil.rmtree(target)
            path.replace(target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"Cannot write {str(directory)!r}: {reason}.", "Choose another output.") from error
    finally:
        if staging is not None and staging.exists():
            with contextlib.suppress(OSError):
                shutil.rmtree(staging)


def check_writable(directory: Path) -> None:
    """Find out before long work whether its result can be written; leaves nothing behind.

    Args:
        directory: Where the result shall be; it need not exist.

    Raises:
        OutputError: It cannot.
    """
    parent = directory
    try:
        while not parent.exists():
            parent = parent.parent
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise OutputError(f"Cannot write {str(directory)!r}: {error.strerror}.", "Choose another output.") from error


def resolve_directory(name: str, folder: str = "", **kwargs: Any) -> Path:
    """The local directory of a saved model: itself, or the Hub repository's snapshot.

    Args:
        name: A directory or a Hub repository.
        folder: A folder of it, such as that of an export; only this is fetched. Without one, all but these folders is.
        **kwargs: `revision`, `token`, `cache_dir` and `local_files_only` are used.

    Returns:
        An existing directory.

    Raises:
        ModelError: It is neither.
    """
    if Path(name).is_dir():
        return Path(name) / folder
    keys = ("revision", "token", "cache_dir", "local_files_only")
    chosen: dict[str, Any] = {key: kwargs[key] for key in keys if key in kwargs}
    aside = [f"{name}/*" for name in (PLOTS, *EXPORTS)]
    chosen |= {"allow_patterns": f"{folder}/*"} if folder else {"ignore_patterns": aside}
    try:
        return Path(snapshot_download(name, **chosen)) / folder
    except Exception as error:  # the Hub client raises many kinds
        raise explain(name, error) from error
