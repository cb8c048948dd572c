"""What every stage of a run is given: where tensors lie, what is finished already, who is told, and the seed."""

from __future__ import annotations

from dataclasses import dataclass, field

from selfpruner_hub.progress import Progress, silent
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.offload import MEMORY, TensorStore


@dataclass(frozen=True)
class Run:
    """The surroundings of a run, the same for all of its stages."""

    store: TensorStore = MEMORY
    """Place of statistics, hidden states and the pruned model."""
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    """Place of what finished layers gave, and of text that was written."""
    progress: Progress = silent
    """Called with (what, done, total)."""
    seed: int = 0
    """Random seed."""


DEFAULT_RUN = Run()
"""In memory, with nothing kept and nobody told."""
