"""Which model the page shows, and its record."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError


class UnavailableError(Exception):
    """A visitor gets no answer; the message says why."""


@dataclass(frozen=True)
class Shown:
    """The model that the page shows."""

    pruned: str
    """Directory or Hub repository of the pruned model."""
    revision: str | None
    dense: str | None
    """Directory or Hub repository of the dense parent; None uses the one that the record names."""
    gguf: str | None
    """Path of the pruned model's GGUF file in its directory or repository; None where it has none."""
    graphs: str | None
    """Directory or Hub repository of its ONNX graphs (layout hub); None where it has none."""

    def file(self, name: str) -> Path:
        """Return the path of a file of the pruned model, which is downloaded if necessary."""
        local = Path(self.pruned)
        return local / name if local.is_dir() else Path(hf_hub_download(self.pruned, name, revision=self.revision))

    @property
    def parent(self) -> str:
        """Directory or Hub repository of the dense model."""
        return self.dense or str(record()["base_model"])

    @property
    def parent_revision(self) -> str | None:
        """Commit of the dense model on the Hub from which the pruned one was made; None where it is not known."""
        return None if self.dense else record().get("base_revision") or None


@cache
def shown() -> Shown:
    """Read which model is shown, from the environment or from `model.json` beside the app, which publishing writes."""
    path = Path(__file__).with_name("model.json")
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = os.environ.get("PRUNED_MODEL") or written.get("pruned")
    if not name:
        raise UnavailableError(
            "Set PRUNED_MODEL to a model made with selfpruner-hub (a Hub repository or a directory)."
        )
    of_model = written if name == written.get("pruned") else {}  # what was written is of the model that was written
    revision, gguf, graphs = (
        os.environ.get(f"PRUNED_{key.upper()}") or of_model.get(key) for key in ("revision", "gguf", "graphs")
    )
    return Shown(name, revision, os.environ.get("DENSE_MODEL"), gguf, graphs)


@cache
def record() -> dict[str, Any]:
    """Read `selfpruner.json` of the pruned model."""
    try:
        return json.loads(shown().file("selfpruner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnavailableError(cannot_be_loaded(shown().pruned, error)) from error


def cannot_be_loaded(name: str, error: Exception) -> str:
    """Return a message for visitors about a model that does not load, without paths of this machine."""
    called = Path(name).name if Path(name).is_dir() else name
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, HfHubHTTPError):  # transformers wraps those of the Hub
        cause = cause.__cause__
    closed = "it is private or gated, and the secret HF_TOKEN of this Space opens it"
    reason = {401: closed, 403: closed, 404: "it is not on the Hub"}.get(cause.response.status_code if cause else 0)
    return f"The model {called} cannot be loaded: {reason or 'it is missing, damaged or out of reach'}."
