"""A pruned model beside its dense parent: speed and memory, in any runtime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.benchmark.compare import benchmark

__all__ = ["benchmark"]


def __getattr__(name: str) -> Any:
    """Import `benchmark` where it is asked for: a process that runs `worker` must not import that module before."""
    if name != "benchmark":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporters.benchmark.compare import benchmark

    return benchmark
