"""What a long stage has finished, kept in a directory, so that the stage goes on from there after an interruption."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner_hub.errors import OutputError


class Checkpoints:
    """Named sets of tensors, each a file that is there whole or not at all.

    Args:
        directory: Of one run, which decides what is in them; None keeps nothing.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def load(self, name: str) -> dict[str, Tensor] | None:
        """What was saved under a name, or None where nothing was, or what was is damaged."""
        if self._directory is None:
            return None
        try:
            return load_file(self._path(self._directory, name))
        except (OSError, SafetensorError):
            return None

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors under a name.

        Args:
            name: Of a file, without its ending.
            tensors: By name.

        Raises:
            OutputError: They cannot be written.
        """
        if self._directory is None:
            return
        path = self._path(self._directory, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".part")
            save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, staged)
            staged.replace(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"Cannot write {path}: {error}.", "Make room, or choose another run directory."
            ) from error

    def clear(self) -> None:
        """Delete everything: what the run made is saved."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, directory: Path, name: str) -> Path:
        return directory / f"{name}.safetensors"
