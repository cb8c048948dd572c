"""Checkpoints of long stages in a directory, from which an interrupted stage resumes."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from selfpruner_hub import ranks
from selfpruner_hub.errors import OutputError

CHECKPOINTS = "stages"
"""Name of the directory of checkpoints in a run directory."""
ELAPSED = "elapsed"
"""Name of the checkpoint of the time that a run has taken."""
_RUN = "run"
"""Key of the run's identity in the metadata of a file."""


class Checkpoints:
    """Named sets of tensors, one file each; a file is complete or absent, and says which run it is of.

    Args:
        directory: Directory of the checkpoints of one run; None saves nothing.
        run: Identity of the run; what another run has saved is not loaded.
        clock: Clock of the run, which is kept with all that is saved.
    """

    def __init__(self, directory: Path | None = None, run: str = "", clock: Clock | None = None) -> None:
        self._directory = directory
        self._run = run
        self._clock = clock

    def of(self, run: str) -> Checkpoints:
        """Give the checkpoints of one run in the same directory.

        Args:
            run: All that the results of its stages depend on, as text.

        Returns:
            Checkpoints that load nothing of another run.
        """
        return Checkpoints(self._directory, hashlib.sha256(run.encode()).hexdigest(), self._clock)

    def timed_by(self, clock: Clock) -> Checkpoints:
        """Give the same checkpoints, which keep the time of a clock with all that they save."""
        return Checkpoints(self._directory, self._run, clock)

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor] | None:
        """Return the tensors that this run saved under a name, on a device; None without such a file, or a damaged one.

        Single numbers stay on the CPU, in float64 too, which some devices do not have.
        """
        if self._directory is None:
            return None
        try:
            with safe_open(self._path(self._directory, name), "pt") as file:
                if (file.metadata() or {}).get(_RUN, "") != self._run:
                    return None
                contents = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        return {key: tensor.to(device) if tensor.dim() else tensor for key, tensor in contents.items()}

    def save(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Save tensors under a name; of several processes, the first one does.

        Args:
            name: File name without its suffix.
            tensors: Tensors by name.

        Raises:
            OutputError: The file cannot be written.
        """
        if self._directory is None or not ranks.is_first():
            return
        path = self._path(self._directory, name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            staged = path.with_suffix(".part")
            copies = {key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}
            save_file(copies, staged, metadata={_RUN: self._run})
            staged.replace(path)
            if self._clock is not None:
                self._clock.keep()
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"Cannot write {path}: {error}.", "Make room, or choose another run directory."
            ) from error

    def clear(self) -> None:
        """Delete all checkpoints, once the result of the run is saved."""
        if self._directory is not None and ranks.is_first():
            shutil.rmtree(self._directory, ignore_errors=True)

    def _path(self, directory: Path, name: str) -> Path:
        return directory / f"{name}.safetensors"


class Clock:
    """Time that a run takes in all, that of killed processes which it resumed from included.

    Args:
        checkpoints: Checkpoints that keep it.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints, self._started = checkpoints, time.monotonic()
        if tensors := checkpoints.load(ELAPSED):
            self._started -= float(tensors["seconds"])
        self._reserved = 0.0

    def reserve(self, seconds: float) -> None:
        """Keep some time for what comes at the end."""
        self._reserved = seconds

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    @property
    def spent(self) -> float:
        """Seconds that are no longer free: those since the start, and the reserved ones."""
        return self.elapsed + self._reserved

    def keep(self) -> None:
        """Keep the time in a checkpoint, beside the work that it took."""
        self._checkpoints.save(ELAPSED, {"seconds": torch.tensor(self.elapsed)})
