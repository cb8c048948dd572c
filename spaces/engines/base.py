"""The interface of an engine, and the needs of all: a first pass, enough memory, errors that visitors may read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from model_source import UnavailableError

GROWTH = 1.3
"""Memory of a model during generation, as a multiple of its weights."""
FLOAT32 = 4
"""Bytes of a weight while the dense model is converted."""

Receive = Callable[[str, int], bool]
"""Callback of an engine: called with each piece of text and the number of tokens so far, it returns whether to stop."""


class Engine(Protocol):
    """A model that is loaded and generates greedy text."""

    @property
    def runtime(self) -> str:
        """Runtime, dtype and threads, in words."""
        ...

    @property
    def longest(self) -> int:
        """Longest prompt and answer together, in tokens."""
        ...

    def write(self, ids: list[int], tokens: int, receive: Receive) -> None:
        """Generate at most `tokens` tokens after the prompt `ids`; hand each piece to `receive` until it says stop."""
        ...


@contextmanager
def or_say(reason: str) -> Iterator[None]:
    """Turn any error into one that visitors may read."""
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:  # of the Hub's client, transformers, the exporters and llama.cpp
        raise UnavailableError(reason) from error


def warm(engine: Any, gpu: bool = False) -> Any:
    """Return the engine after a first pass, which is slow, except on a GPU that is given out for each request."""
    if not gpu:
        engine.write([1, 2, 3], 2, lambda text, tokens: False)
    return engine


def threads_text(number: int) -> str:
    """Return a number of threads in words."""
    return f"{number} {'thread' if number == 1 else 'threads'}"


def check_size(model: str, weights: float) -> None:
    """Refuse a model, named in words, whose weights in bytes leave too little memory to run it."""
    needed = weights * GROWTH
    there = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else memory_left()
    if needed > there:
        raise UnavailableError(
            f"{model} is too large for this machine: it needs about {needed / 1e9:.1f} GB of memory, and "
            f"{there / 1e9:.1f} GB are left."
        )


def memory_left() -> float:
    """Return the free memory of the machine, or of the container where it has less, in bytes."""
    left, group = float(psutil.virtual_memory().available), Path("/sys/fs/cgroup")
    try:
        limit, used = (float((group / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return min(left, limit - used + float(counts["inactive_file"]))  # files that were read make room
    except (OSError, ValueError, KeyError):  # no container, or one without a limit
        return left
