"""The interface of format writers, and the helpers that they share."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from selfpruner_hub.errors import MissingExtraError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Written:
    """A writer's report on the files that it wrote."""

    options: dict[str, Any]
    """Values of all options, with defaults filled in, as JSON values."""
    libraries: tuple[str, ...]
    """Packages whose versions go into the record, in addition to torch and transformers."""
    tolerance: float
    """Largest allowed distance of the export's logits from PyTorch's in float32, or of what `compared` names."""
    compare: Callable[[], Callable[[], float]] | None = None
    """Function that runs the PyTorch model, and returns the function that runs the staged export and returns that
    distance; None where this machine cannot run it.

    The second holds the PyTorch model's logits but not the model, because the runtime loads the weights again.
    """
    compared: str = "logit"
    """Quantity that `compare` compares: `"logit"` or `"log-probability"`."""
    unchecked: str = ""
    """Reason why `compare` is None, in one sentence."""
    remark: str = ""
    """Note for users of the export, in one sentence."""


class FormatWriter(Protocol):
    """Function that writes one format; its keyword-only parameters are the options that a user may set."""

    def __call__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, staging: Path, **options: Any
    ) -> Written:
        """Export a float32 model on the CPU into `staging`, which already holds the tokenizer and records."""
        ...


def require(library: str, extra: str) -> None:
    """Raise `MissingExtraError` unless a library is installed; `extra` is this package's extra that installs it."""
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(library, extra)


def one_line(message: object) -> str:
    """First line of a library's message, at most 300 characters."""
    lines = str(message).strip().splitlines() or [type(message).__name__]
    return lines[0][:300]


def one_of(option: str, value: Any, choices: Collection[str]) -> str:
    """Return `value`; raise `UserError` unless it is one of the choices of an option."""
    if not isinstance(value, str) or value not in choices:
        raise UserError(f"Unknown {option} {value!r}.", f"Choose {', '.join(choices)}.")
    return value
