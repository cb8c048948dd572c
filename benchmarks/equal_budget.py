"""The paper's search by different proposers, with equal evaluations from the same starting population.

Run: python benchmarks/equal_budget.py WORK SEARCH_TEXT UNSEEN_TEXT [--beta β] [--methods …] [--seeds …]
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text; `--help` lists the rest)
WORK keeps a row for each run, and its journal: a benchmark that was stopped goes on. The package cmaes must be there.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import Rows, write

from selfpruner_hub.calibration.corpus import consecutive_windows, load_corpus
from selfpruner_hub.cli.demo import NAME, load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import cross_entropy
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import ParameterBudget, Rates
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.search.journal import Journal, RoundLine
from selfpruner_hub.search.llm.endpoint import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.outcome import Standing
from selfpruner_hub.search.proposers import (
    EvolutionProposer,
    Operation,
    Proposal,
    Proposer,
    RandomProposer,
    Scored,
    random_rates,
)
from selfpruner_hub.settings import PRESETS

PAPER = PRESETS["paper"]
SETTINGS = replace(PAPER, population=0)
"""The starting population takes the place of the first proposals."""
CONTROL = "evolution"
"""Method that the others are compared with, window by window."""
WINDOWS = 32
SIGMA = 0.1
"""First step of CMA-ES, as a rate."""


class CmaEs:
    """CMA-ES of the package cmaes over the layers' rates, from the best of the starting population.

    It is built anew for every question, from the scores of all rounds, so a run that was stopped goes on as if it had
    not been. It learns from the rates of the plans that were scored, which the projection has moved onto the budget.
    """

    name = "cmaes"

    def __init__(self, budget: ParameterBudget, children: int = PAPER.mutation) -> None:
        self._children = children  # of a round; fewer are asked for in place of duplicates
        self._bounds = np.array([[budget.p_min, budget.p_max]] * budget.shape.num_layers)

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Sample from the distribution that all scores so far have led to."""
        from cmaes import CMA

        by_round = sorted(history, key=lambda scored: scored.round)
        start = min((s for s in by_round if s.round == 0), key=lambda s: s.fitness)
        inside = np.clip(start.rates.ffn, *self._bounds.T)
        optimiser = CMA(mean=inside, sigma=SIGMA, bounds=self._bounds, population_size=self._children, seed=0)
        for _, of_round in groupby((s for s in by_round if s.round), key=lambda scored: scored.round):
            told = [(np.array(s.rates.ffn), s.fitness) for s in of_round]
            if len(told) == self._children:
                optimiser.tell(told)
        optimiser.reseed_rng(int(rng.integers(2**31)))
        return [Proposal(Rates.tied(optimiser.ask().tolist())) for _ in range(count)]

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history holds them."""


def proposers(pruner: AutoPruner, budget: ParameterBudget, endpoint: str | None) -> dict[str, Callable[[], Proposer]]:
    """Functions that make each proposer."""
    found: dict[str, Callable[[], Proposer]] = {
        "evolution": lambda: EvolutionProposer(budget),
        "random": lambda: RandomProposer(budget),
        "cmaes": lambda: CmaEs(budget, SETTINGS.mutation),
        "self": lambda: ModelProposer(pruner.model, pruner.tokenizer, budget, NAME, SETTINGS),
    }
    if endpoint is not None:
        found["endpoint"] = lambda: EndpointProposer(endpoint, None, budget, NAME, SETTINGS)
    return found


def population(budget: ParameterBudget, seed: int) -> dict[str, Rates]:
    """The starting population of a seed: uniform rates, and as many random ones as the paper has."""
    rng = np.random.default_rng(seed)
    drawn = {f"start-{number}": random_rates(budget, rng) for number in range(PAPER.population - 1)}
    return {"uniform": budget.spread([budget.beta] * budget.shape.num_layers), **drawn}


@torch.inference_mode()
def by_window(slicer: Slicer, layers: Any, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of each window, in nats a token."""
    with with_layers(slicer.model, layers) as model:
        return [round(cross_entropy(model, window[None]), 5) for window in windows]


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired difference of each run from the control of the same seed on unseen text, with its standard error."""
    control = {(row["beta"], row["seed"]): row["nats"] for row in rows if row["method"] == CONTROL}
    found = []
    for row in rows:
        told = {key: value for key, value in row.items() if key != "nats"}
        told["unseen_perplexity"] = round(math.exp(statistics.mean(row["nats"])), 2)
        if row["method"] != CONTROL and (other := control.get((row["beta"], row["seed"]))):
            gaps = [own - theirs for own, theirs in zip(row["nats"], other, strict=True)]
            told["difference"] = round(statistics.mean(gaps), 4)
            told["standard_error"] = round(statistics.stdev(gaps) / math.sqrt(len(gaps)), 4)
        found.append(told)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Search with every method and seed, and measure the best plan of each on unseen text."""
    options = _parser().parse_args(words)
    rows, pruner = Rows(options.work / "rows.jsonl"), load_embedded()
    corpus = load_corpus(
        options.search_text,
        pruner.tokenizer,
        tokens=PAPER.calibration_tokens + PAPER.fitness_tokens,
        window=PAPER.window,
    )
    calibration, fitness_text = corpus.split(PAPER.calibration_tokens, PAPER.fitness_tokens)
    unseen = consecutive_windows(options.unseen_text, pruner.tokenizer, PAPER.window, WINDOWS).windows
    budget = ParameterBudget(pruner.shape, options.beta, p_min=PAPER.p_min, p_max=PAPER.p_max, tied=True)
    with prepared(pruner.model, calibration.windows, PAPER) as ready:
        fitness = Fitness(ready.slicer, fitness_text.windows, PAPER.fitness)
        for seed in options.seeds:
            starts = population(budget, seed)
            for method in options.methods:
                key = {"method": method, "beta": options.beta, "seed": seed}
                if rows.have(**key):
                    continue
                directory, started = options.work / "-".join(map(str, key.values())), time.perf_counter()
                journal = Journal(directory, key)
                proposer = proposers(pruner, budget, options.endpoint)[method]()
                settings = replace(SETTINGS, evaluations=options.evaluations)
                found = search(proposer, Problem(budget, starts, fitness), journal, settings, seed=seed, report=_tell)
                scored = [line for line in journal.lines if isinstance(line, RoundLine)]
                row = {
                    **key,
                    "evaluations": found.spent,
                    "fitness": round(found.best.fitness, 3),
                    "best_start": round(found.best_seed.fitness, 3),
                    "best_from": found.best.origin,
                    "replies": found.counts,
                    "tokens": found.tokens,
                    "minutes": round((time.perf_counter() - started) / 60, 1),
                    "curve": [(line.spent, round(line.best, 2)) for line in scored],
                    "nats": by_window(ready.slicer, ready.slicer.layers(found.best.plan), unseen),
                }
                rows.keep(row)
    write(
        "equal_budget",
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}: the paper's settings (preset paper: one rate a layer, Wanda-sp, "
        f"no repair, perplexity on {PAPER.fitness_tokens} tokens of {Path(options.search_text).name}), "
        f"{options.evaluations:g} evaluations for each method, those of the {PAPER.population} plans of the starting "
        "population included, which is the same for all methods of a seed; minutes: of the last start, where a run was "
        f"stopped. Perplexity on {WINDOWS} windows of {PAPER.window} tokens of {Path(options.unseen_text).name}, on "
        f"which nothing was chosen; difference: mean difference in nats a token from {CONTROL} with the same seed on "
        "the same windows, and its standard error over windows",
        compared(sorted(rows, key=lambda row: (row["beta"], row["seed"], row["method"]))),
        options.output,
    )


def _tell(at: Standing) -> None:
    if at.best is not None and not at.spent % 20:
        print(f"{at.spent:g} evaluations: {at.best.fitness:.2f} ({at.best.origin})", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("search_text", metavar="SEARCH_TEXT")
    parser.add_argument("unseen_text", metavar="UNSEEN_TEXT")
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--methods", nargs="+", default=["evolution", "random", "cmaes", "self"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=float, default=PAPER.evaluations)
    parser.add_argument("--endpoint", metavar="URL", help="an OpenAI-compatible endpoint, for the method endpoint")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    return parser


if __name__ == "__main__":
    main()
