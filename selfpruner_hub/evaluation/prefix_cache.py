"""Cache hidden states of the best plans at some layer boundaries; candidates with the same first layers start there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from selfpruner_hub.plans.plan import Plan

KEPT = 4
"""Number of plans whose hidden states are cached, per number of windows: the best plans, which become parents."""


class PrefixCache:
    """Caches hidden states at layer boundaries and finds the boundary at which a candidate can start.

    Fitness is bit-equal with and without the cache.

    Args:
        capacity: Maximum size in bytes of the hidden states for one number of windows.
    """

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._best: dict[int, list[tuple[float, CachedPrefix]]] = {}

    def start(self, plan: Plan, windows: int, size: int) -> CachedPrefix:
        """Find the cached boundary at which `plan` skips the most layers.

        Args:
            plan: The candidate.
            windows: Number of windows that it is scored on; hidden states are cached separately for each number.
            size: Size in bytes of the hidden states of these windows at one boundary.

        Returns:
            The start of the candidate; its depth is 0 if no cached plan shares its first layers.
        """
        depth, states = 0, {}
        for _, known in self._best.get(windows, []):
            shared = _shared(known.plan, plan)
            reached = max((mark for mark in known.states if mark <= shared), default=0)
            if reached > depth:
                depth, states = reached, {mark: kept for mark, kept in known.states.items() if mark <= reached}
        layers = len(plan.layers)
        count = min(int(self._capacity // (KEPT * size)), layers - 1)
        checkpoints_at = {round((i + 1) * layers / (count + 1)) for i in range(count)}
        return CachedPrefix(plan, depth, states, {mark for mark in checkpoints_at if mark > depth})

    def keep(self, start: CachedPrefix, windows: int, fitness: float) -> None:
        """Cache the hidden states of a candidate if it is among the best so far.

        Args:
            start: Result of `start`, after its layers were run.
            windows: Number of windows, as in `start`.
            fitness: Score of the candidate, lower is better.
        """
        ranked = sorted([*self._best.get(windows, []), (fitness, start)], key=lambda pair: pair[0])
        self._best[windows] = ranked[:KEPT]


class CachedPrefix:
    """A candidate that starts at a layer boundary and records its own hidden states at later boundaries.

    Args:
        plan: The candidate.
        depth: Number of layers that it skips.
        states: Hidden states of each forward pass, `[B, W, H]`, by boundary.
        checkpoints_at: PrefixCache beyond `depth` at which to record hidden states.
    """

    def __init__(self, plan: Plan, depth: int, states: dict[int, list[Tensor]], checkpoints_at: set[int]) -> None:
        self.plan = plan
        self.depth = depth
        self.states = states
        self._checkpoints_at = checkpoints_at

    def layers(self, build: Callable[[int], nn.Module]) -> nn.ModuleList:
        """Return placeholders for the skipped layers, and the other layers, which `build` makes from their index.

        They are valid for one pass over the windows, in the same order and the same batches as the cached pass.
        """
        built = {index: build(index) for index in range(self.depth, len(self.plan.layers))}
        skipped: list[nn.Module] = [_Passed() for _ in range(self.depth)]
        if self.depth:
            skipped[-1] = _Known(self.states[self.depth])
        for mark in self._checkpoints_at:
            self.states[mark] = []
            built[mark - 1].register_forward_hook(_recorder(self.states[mark]))
        return nn.ModuleList([*skipped, *built.values()])


def _shared(a: Plan, b: Plan) -> int:
    """Number of first layers that two plans have in common."""
    pairs: Sequence[Any] = list(zip(a.layers, b.layers, strict=True))
    return next((index for index, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _recorder(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _args, output: kept.append(output)


class _Passed(nn.Module):
    """A placeholder for a skipped layer; it returns its input."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class _Known(nn.Module):
    """A placeholder for the last skipped layer; it returns the cached hidden states, batch by batch."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self._states: Iterator[Tensor] = iter(states)

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return next(self._states)
