"""Hidden states of the best plans at some layer boundaries: a candidate with the same first layers starts there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from selfpruner_hub.plans.plan import Plan

KEPT = 4
"""Plans whose hidden states are kept, for each number of windows: those that become parents."""


class Boundaries:
    """Keeps hidden states, and says where a candidate can start. Fitness is the same with it and without, to the bit.

    Args:
        capacity: Bytes that the hidden states for one number of windows may take.
    """

    def __init__(self, capacity: float) -> None:
        self._capacity = capacity
        self._best: dict[int, list[tuple[float, Start]]] = {}

    def start(self, plan: Plan, windows: int, size: int) -> Start:
        """Find the kept boundary that lets `plan` skip the most layers.

        Args:
            plan: The candidate.
            windows: How many windows it is scored on: hidden states hold for the first so many.
            size: Bytes of the hidden states of these windows at one boundary.

        Returns:
            Where it starts: at layer 0 where nothing is shared.
        """
        depth, states = 0, {}
        for _, known in self._best.get(windows, []):
            shared = _shared(known.plan, plan)
            reached = max((mark for mark in known.states if mark <= shared), default=0)
            if reached > depth:
                depth, states = reached, {mark: kept for mark, kept in known.states.items() if mark <= reached}
        layers = len(plan.layers)
        count = min(int(self._capacity // (KEPT * size)), layers - 1)
        marks = {round((i + 1) * layers / (count + 1)) for i in range(count)}
        return Start(plan, depth, states, {mark for mark in marks if mark > depth})

    def keep(self, start: Start, windows: int, fitness: float) -> None:
        """Keep what a candidate left at the boundaries, where it is among the best so far.

        Args:
            start: What `start` returned, after its layers were run.
            windows: As in `start`.
            fitness: Its score, lower is better.
        """
        ranked = sorted([*self._best.get(windows, []), (fitness, start)], key=lambda pair: pair[0])
        self._best[windows] = ranked[:KEPT]


class Start:
    """A candidate that starts at a layer boundary, and leaves its own hidden states at further ones.

    Args:
        plan: The candidate.
        depth: Layers that it skips.
        states: By boundary, the hidden states of each forward pass, `[B, W, H]`.
        marks: Boundaries beyond `depth` at which to keep hidden states.
    """

    def __init__(self, plan: Plan, depth: int, states: dict[int, list[Tensor]], marks: set[int]) -> None:
        self.plan = plan
        self.depth = depth
        self.states = states
        self._marks = marks

    def layers(self, build: Callable[[int], nn.Module]) -> nn.ModuleList:
        """Stand-ins for the layers that are skipped, and the others, which `build` makes from their index.

        They serve for one run over the windows, in their order and in the same batches.
        """
        built = {index: build(index) for index in range(self.depth, len(self.plan.layers))}
        skipped: list[nn.Module] = [_Passed() for _ in range(self.depth)]
        if self.depth:
            skipped[-1] = _Known(self.states[self.depth])
        for mark in self._marks:
            self.states[mark] = []
            built[mark - 1].register_forward_hook(_recorder(self.states[mark]))
        return nn.ModuleList([*skipped, *built.values()])


def _shared(a: Plan, b: Plan) -> int:
    """First layers that two plans have in common."""
    pairs: Sequence[Any] = list(zip(a.layers, b.layers, strict=True))
    return next((index for index, (x, y) in enumerate(pairs) if x != y), len(pairs))


def _recorder(kept: list[Tensor]) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _args, output: kept.append(output)


class _Passed(nn.Module):
    """A layer whose work is done."""

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return hidden


class _Known(nn.Module):
    """The last layer before a boundary: gives what it gave when it was run."""

    def __init__(self, states: list[Tensor]) -> None:
        super().__init__()
        self._states: Iterator[Tensor] = iter(states)

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        return next(self._states)
