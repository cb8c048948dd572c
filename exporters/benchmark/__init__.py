"""Speed and memory of a pruned model and its dense parent, in any runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.benchmark.compare import benchmark

__all__ = ["benchmark"]


def __getattr__(name: str) -> Any:
    """Import `benchmark` on first access, so that a process that runs `worker` does not import `compare`."""
    if name != "benchmark":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporters.benchmark.compare import benchmark

    return benchmark
