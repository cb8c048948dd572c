"""CMA-ES as a proposer, alone and with a language model on a share of its trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from cmaes import CMA

from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.search.llm.prompts import solution
from selfpruner_hub.search.proposers import Operation, Proposal, Proposer, Scored

SIGMA = 0.1
"""First step of CMA-ES, as a rate."""
SHARE = 0.3
"""Share of the trials that the language model writes, as in arXiv 2603.24647."""
RECENT = 20
"""Number of last trials that the language model is shown."""
RIDGE = 0.1
"""Ridge of the fit of the layers' effects, as a share of the mean squared deviation of a rate."""

TEMPLATE = """\
We compress the language model $model without training. It has $layers decoder layers. Each solution lists, for layer \
1 to layer $layers, the percentage that is removed. $goal No value is above $p_max. A lower loss is better.

The optimiser CMA-ES works on this too. Its mean: {mean}. Its step: {step:.1f} points.
Change of the loss, in percent, where 10 points more are removed from a layer, fitted to all trials: {effects}.

The last trials, with the loss that the fit predicts:
{trials}

The best solutions, from worst to best (number 1 is the best):
$history

Write a new solution whose loss is lower than all of these."""


class CmaEs:
    """CMA-ES of the package cmaes over the layers' rates, from the best of the starting population.

    It is built anew for every question, from the scores of all rounds, so a run that was stopped goes on as if it had
    not been. It learns from the rates of the plans that were scored, which the projection has moved onto the budget.
    """

    name = "cmaes"

    def __init__(self, budget: Budget, children: int) -> None:
        self._budget = budget
        self._children = children  # of a round; fewer are asked for in place of duplicates
        self._bounds = np.array([[budget.p_min, budget.p_max]] * budget.shape.num_layers)

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Sample from the distribution that all scores so far have led to."""
        optimiser = self._learned(history)
        optimiser.reseed_rng(int(rng.integers(2**31)))
        return [Proposal(Rates.tied(optimiser.ask().tolist())) for _ in range(count)]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history holds them."""

    def _learned(self, history: Sequence[Scored]) -> CMA:
        by_round = sorted(history, key=lambda scored: scored.round)
        start = min((s for s in by_round if s.round == 0), key=lambda s: s.fitness)
        inside = np.clip(start.rates.ffn, *self._bounds.T)
        optimiser = CMA(mean=inside, sigma=SIGMA, bounds=self._bounds, population_size=self._children, seed=0)
        for _, of_round in groupby((s for s in by_round if s.round), key=lambda scored: scored.round):
            solutions = [(np.array(s.rates.ffn), s.fitness) for s in of_round]
            if len(solutions) == self._children:
                optimiser.tell(solutions)
        return optimiser


class CmaEsWithModel(CmaEs):
    """CMA-ES whose trials a language model writes in part, shown where the optimiser stands and what trials gave.

    Args:
        budget: Parameter budget of the search, with one rate a layer.
        children: Number of children of a round.
        templates: Directory that the prompts are written to, from which the proposer reads them.
        proposer: Function that makes a proposer of a language model that reads its templates there.
    """

    def __init__(self, budget: Budget, children: int, templates: Path, proposer: Callable[[Path], Proposer]) -> None:
        super().__init__(budget, children)
        self._templates = templates
        self._model = proposer(templates)
        self.name = f"{CmaEs.name}+{self._model.name}"

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Let the model write its share of the trials, and sample the others."""
        optimiser, own = self._learned(history), round(SHARE * count)
        self._templates.mkdir(parents=True, exist_ok=True)
        text = TEMPLATE.format(**told(self._budget, history, optimiser))
        (self._templates / "initial.txt").write_text(text, encoding="utf-8")
        written = list(self._model.ask("initial", history, own, rng)) if own else []
        return written + super().ask(operation, history, count - own, rng)


def told(budget: Budget, history: Sequence[Scored], optimiser: CMA) -> dict[str, object]:
    """What the prompt says of the optimiser and the trials; `history` is best first."""
    rates = np.array([s.rates.ffn for s in history])
    losses = np.log([s.fitness for s in history])
    away = rates - rates.mean(axis=0)
    gram = away.T @ away
    ridge = RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    effects = np.linalg.solve(gram + ridge, away.T @ (losses - losses.mean()))
    predicted = np.exp(losses.mean() + away @ effects)
    trials = sorted(zip(history, predicted, strict=True), key=lambda trial: trial[0].round)
    return {
        "mean": solution(budget, Rates.tied(optimiser.mean.tolist())),
        "step": 100 * optimiser._sigma,
        "effects": [round(10 * effect) for effect in effects],  # of 0.1 of a rate, in percent
        "trials": "\n".join(
            f"loss {s.fitness:.4g}, predicted {fit:.4g}: {solution(budget, s.rates)}" for s, fit in trials[-RECENT:]
        ),
    }
