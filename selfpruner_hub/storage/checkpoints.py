"""Checkpoints of long stages in a directory, from which an interrupted stage resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selfpruner_hub.errors import OutputError


class Checkpoints:
    """Named sets of tensors, one file each; a file is complete or absent.

    Args:
        directory: Directory of the checkpoints of one run; None saves nothing.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """Return the tensors saved under a name, on a device; None where there are none, or the file is damaged.

        Single numbers stay on the CPU, in float64 too, which some devices do not have.
        """
        if self._directory is None:
            return None
        try:
            found = load_file(self._path(self._directory, name))
        except (OSError, SafetensorError):
            return None
        return {key: tensor.to(device) if tensor.dim() else tensor for key, tensor in found.items()}

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors under a name.

        Args:
            name: File name without its suffix.
            tensors: Tensors by name.

        Raises:
            OutputError: The file cannot be written.
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
        """Delete all checkpoints, once the result of the run is saved."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, directory: Path, name: str) -> Path:
        return directory / f"{name}.safetensors"
