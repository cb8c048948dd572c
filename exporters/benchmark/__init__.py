"""Speed and memory of a pruned model and its dense parent, in any runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.benchmark.compare import Passes, benchmark

__all__ = ["Passes", "benchmark"]


def __getattr__(name: str) -> Any:
    """Import `compare` on first access, so that a process that runs `worker` does not import it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporters.benchmark import compare

    return getattr(compare, name)
