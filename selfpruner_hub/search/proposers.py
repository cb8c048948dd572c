"""The protocol of a proposer, and the two proposers without a language model: evolution and random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import StepEffects

Operation = Literal["initial", "crossover", "mutation"]
"""Kind of proposal: new rates, a child of two parents, or a changed parent."""


@dataclass(frozen=True)
class Scored:
    """A plan with its fitness (lower is better)."""

    plan: Plan
    rates: Rates
    """The plan's exact rates, after the projection to the budget."""
    fitness: float
    share: float
    """Share of the windows of the fitness text that the fitness was measured on, in (0, 1]."""
    origin: str
    """Source of the plan: `seed:NAME`, the proposer's name, or `fallback`."""
    round: int
    slopes: StepEffects | None = None
    """Predicted effects of small changes of the plan, where measured."""


@dataclass(frozen=True)
class Proposal:
    """One reply of a proposer. Without rates it is a refusal, and `error` says why."""

    rates: Rates | None
    parents: tuple[int, ...] = ()
    """Indices into the history that was shown, where the proposer chose parents. A proposal with one parent changes
    that parent: layers whose rates are unchanged stay as they are in the parent."""
    prompt: str = ""
    reply: str = ""
    error: str = ""
    tokens: int = 0
    """Number of tokens that a language model read and wrote."""


class Proposer(Protocol):
    """Interface of ask and tell. Proposers score nothing and write nothing; all randomness comes from `rng`.

    If it has a true attribute `reads_slopes`, its history holds the predicted effects of small changes of the best
    plan. The progress line shows what the tokens cost by its attribute `token_price`, in dollars for a million.
    Its method `resume`, if it has one, is called before the search with its proposals that the journal has.
    """

    name: str

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> Sequence[Proposal]:
        """Propose rates.

        Args:
            operation: Kind of proposal.
            history: Plans scored so far on the first share of the windows, best first.
            count: Number of proposals.
            rng: Random generator; the same state and history give the same answer.

        Returns:
            At most `count` proposals; they need not meet the budget: the loop projects them.
        """
        ...

    def tell(self, scored: Sequence[Scored]) -> None:
        """Receive the scores of the last proposals."""
        ...


class RandomProposer:
    """Proposes independent random rates: the baseline for every other proposer."""

    name = "random"

    def __init__(self, budget: Budget) -> None:
        self._budget = budget

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Draw FFN rates uniformly around β, and attention rates that remove few KV groups."""
        return [Proposal(random_rates(self._budget, rng)) for _ in range(count)]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores."""


class EvolutionProposer:
    """Level-switch evolution: a mutation moves rates between layers, a crossover mixes two parents layer by layer."""

    name = "evolution"

    def __init__(self, budget: Budget, elite: int = 8) -> None:
        self._budget = budget
        self._elite = elite

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Propose children of the best plans; random rates where there is no history."""
        if operation == "initial" or not history:
            return [Proposal(random_rates(self._budget, rng)) for _ in range(count)]
        breed = self._mutate if operation == "mutation" or min(len(history), self._elite) < 2 else self._cross
        return [breed(history[: self._elite], rng) for _ in range(count)]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history holds them."""

    def _pick(self, elite: Sequence[Scored], rng: np.random.Generator) -> int:
        """Pick the better of two random ranks (tournament selection)."""
        return int(min(rng.integers(len(elite), size=2)))

    def _cross(self, elite: Sequence[Scored], rng: np.random.Generator) -> Proposal:
        first = self._pick(elite, rng)
        second = int((first + 1 + rng.integers(len(elite) - 1)) % len(elite))
        a, b = elite[first].rates, elite[second].rates
        from_a = rng.random(len(a.ffn)) < 0.5
        mixed = [tuple(np.where(from_a, x, y).tolist()) for x, y in ((a.attention, b.attention), (a.ffn, b.ffn))]
        return Proposal(Rates(*mixed), (first, second))

    def _mutate(self, elite: Sequence[Scored], rng: np.random.Generator) -> Proposal:
        parent = self._pick(elite, rng)
        attention, ffn = (np.array(r) for r in (elite[parent].rates.attention, elite[parent].rates.ffn))
        layers = len(ffn)
        groups = self._budget.kv_multiple / np.array([w.num_key_value_heads for w in self._budget.shape.dense.layers])
        if self._budget.whole_ffn:  # nothing but KV groups costs anything
            gaining, losing = np.flatnonzero(attention > groups / 2), np.flatnonzero(attention + 1.5 * groups < 1)
            if len(gaining) and len(losing):
                gains, loses = rng.choice(gaining), rng.choice(losing)
                attention[gains] -= groups[gains]
                attention[loses] += groups[loses]
            return Proposal(Rates(tuple(attention.clip(0, 1).tolist()), tuple(ffn.tolist())), (parent,))
        for _ in range(1 + int(rng.integers(3))):
            gains, loses = rng.integers(layers, size=2)
            step = rng.uniform(0.02, 0.15)
            ffn[gains] -= step
            ffn[loses] += step
        if rng.random() < 0.5:  # one layer loses KV groups, or gets some back
            layer = rng.integers(layers)
            attention[layer] += groups[layer] if rng.random() < 0.5 else -groups[layer]
        attention = ffn if self._budget.tied else attention
        return Proposal(Rates(tuple(attention.clip(0, 1).tolist()), tuple(ffn.clip(0, 1).tolist())), (parent,))


def random_rates(budget: Budget, rng: np.random.Generator) -> Rates:
    """Draw FFN rates uniformly in ±60 % of β; each layer loses `kv_multiple` KV groups with probability β / 2.

    Where FFN channels cost nothing, the attention rates are drawn in place of the FFN's.
    """
    layers = budget.shape.num_layers
    drawn = tuple(rng.uniform(0.4 * budget.share, 1.6 * budget.share, layers).clip(0, 1).tolist())
    if budget.tied or budget.whole_ffn:
        return budget.spread(drawn)
    groups = np.array([w.num_key_value_heads for w in budget.shape.dense.layers])
    return Rates(tuple(((rng.random(layers) < budget.share / 2) * budget.kv_multiple / groups).tolist()), drawn)
