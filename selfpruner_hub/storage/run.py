"""Context that the stages of a run share: tensor store, checkpoints, progress and random seed."""

from __future__ import annotations

from dataclasses import dataclass, field

from selfpruner_hub.progress import Progress, silent
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.offload import MEMORY, TensorStore


@dataclass(frozen=True)
class Run:
    """Context of a run, the same for all of its stages."""

    store: TensorStore = MEMORY
    """Store of statistics, hidden states and the pruned model."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """Checkpoints of finished layers, and of text that the model generated."""
    progress: Progress = silent
    """Function that is called with (what, done, total)."""
    seed: int = 0
    """Random seed."""


DEFAULT_RUN = Run()
"""Run in memory, without checkpoints and without progress."""
