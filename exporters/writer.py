"""What the writer of a format is, and what writers share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.errors import MissingExtraError, UserError


@dataclass(frozen=True)
class Written:
    """What a writer tells of the files that it wrote."""

    options: dict[str, Any]
    """All options as they were taken, defaults filled in; JSON values."""
    libraries: tuple[str, ...]
    """Distributions whose versions the record keeps, beside torch and transformers."""
    tolerance: float
    """How far the artefact's logits may be from PyTorch's float32."""
    measure: Callable[[], float] | None = None
    """Runs the staged artefact and returns that distance; None where this machine cannot run it.

    It has what the PyTorch model said, and not the model: the runtime is about to load the weights again.
    """
    unchecked: str = ""
    """Why `measure` is None, in one sentence."""
    remark: str = ""
    """What a user of the artefact should know, in one sentence."""


class Writer(Protocol):
    """Writes one format; its keyword-only parameters are the options that a user may give."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, staging: Path, **options: Any
    ) -> Written:
        """Write the artefact of a float32 model on the CPU into `staging`, which holds tokenizer and records."""
        ...


def require(library: str, extra: str) -> None:
    """Raise `MissingExtraError` unless a library is installed, of which an extra of this package tells the versions."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra)


def one_line(said: object) -> str:
    """The first line of what a library said, at most 300 characters of it."""
    lines = str(said).strip().splitlines() or [type(said).__name__]
    return lines[0][:300]


def one_of(option: str, value: str, choices: Collection[str]) -> str:
    """Return `value`, or raise `UserError` unless it is among the choices of an option."""
    if value not in choices:
        raise UserError(f"Unknown {option} {value!r}.", f"Choose {', '.join(choices)}.")
    return value
