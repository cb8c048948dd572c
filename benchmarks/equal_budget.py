"""The paper's search by different proposers, with equal evaluations from the same starting population.

Run: python benchmarks/equal_budget.py WORK SEARCH_TEXT UNSEEN_TEXT [--beta β] [--methods …] [--seeds …]
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text; `--help` lists the rest)
WORK keeps a row for each run, and its journal: a benchmark that was stopped goes on. A new WORK takes the rows of
equal_budget.json, so that runs add up. The package cmaes must be there.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from optimisers import CmaEs, CmaEsWithModel
from protocol import Rows, arguments, paired, write

from selfpruner_hub.calibration.corpus import consecutive_windows, load_corpus
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import cross_entropy
from selfpruner_hub.models.loading import EMBEDDED_MODEL, embedded_model
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.journal_lines import RoundLine
from selfpruner_hub.search.llm.endpoint_proposer import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.outcome import Standing
from selfpruner_hub.search.proposers import (
    EvolutionProposer,
    Proposer,
    RandomProposer,
    random_rates,
)
from selfpruner_hub.settings import PRESETS, EndpointOptions, LanguageModelOptions

PAPER = PRESETS["paper"]
SCHEDULE = replace(PAPER.schedule, population=0)
"""The starting population takes the place of the first proposals."""
CONTROLS = {"cmaes+self": "cmaes"}
"""Method that another is compared with, window by window; the others are compared with evolution."""
WINDOWS = 32


def proposers(
    pruner: AutoPruner, budget: Budget, endpoint: Sequence[str] | None, directory: Path
) -> dict[str, Callable[[], Proposer]]:
    """Functions that make each proposer; `endpoint`: URL and model; `directory` is for prompts of their own."""

    def own(templates: Path | None = None) -> Proposer:
        options = LanguageModelOptions(templates=str(templates or ""))
        return ModelProposer(pruner.model, pruner.tokenizer, budget, EMBEDDED_MODEL, options)

    by_method: dict[str, Callable[[], Proposer]] = {
        "evolution": lambda: EvolutionProposer(budget),
        "random": lambda: RandomProposer(budget),
        "cmaes": lambda: CmaEs(budget, SCHEDULE.mutation),
        "self": own,
        "cmaes+self": lambda: CmaEsWithModel(budget, SCHEDULE.mutation, directory / "prompts", own),
    }
    if endpoint is not None:
        by_method["endpoint"] = lambda: EndpointProposer(*endpoint, budget, EMBEDDED_MODEL, EndpointOptions())
    return by_method


def population(budget: Budget, seed: int) -> dict[str, Rates]:
    """The starting population of a seed: uniform rates, and as many random ones as the paper has."""
    rng = np.random.default_rng(seed)
    drawn = {f"start-{number}": random_rates(budget, rng) for number in range(PAPER.schedule.population - 1)}
    return {"uniform": budget.spread([budget.share] * budget.shape.num_layers), **drawn}


@torch.inference_mode()
def by_window(slicer: Slicer, layers: Any, windows: torch.Tensor) -> list[float]:
    """Mean negative log-likelihood of each window, in nats a token."""
    with with_layers(slicer.model, layers) as model:
        return [round(cross_entropy(model, window[None]), 5) for window in windows]


def compared(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The paired difference of each run from its control of the same seed on unseen text, with its standard error."""
    nats = {(row["method"], row["beta"], row["seed"]): row["nats"] for row in rows}
    results = []
    for row in rows:
        result = {**row, "unseen_perplexity": round(math.exp(mean(row["nats"])), 2)}
        control = CONTROLS.get(row["method"], "evolution")
        other = nats.get((control, row["beta"], row["seed"]))
        if other is not None and control != row["method"]:
            result |= {"control": control, **paired(row["nats"], other)}
        results.append(result)
    return results


def main(words: Sequence[str] | None = None) -> None:
    """Search with every method and seed, and measure the best plan of each on unseen text."""
    options = _parser().parse_args(words)
    published = (options.output or Path(__file__).parent) / "equal_budget.json"
    rows, pruner = Rows(options.work / "rows.jsonl", published), AutoPruner.from_pretrained(**embedded_model())
    runs = [(seed, method) for seed in options.seeds for method in options.methods]
    missing = [run for run in runs if not rows.have(method=run[1], beta=options.beta, seed=run[0])]
    for row in searched(pruner, options, missing) if missing else ():
        rows.keep(row)
        publish(rows, options, pruner.model.dtype)
    publish(rows, options, pruner.model.dtype)


def searched(
    pruner: AutoPruner, options: argparse.Namespace, runs: Sequence[tuple[int, str]]
) -> Iterator[dict[str, Any]]:
    """Yield the row of each (seed, method)."""
    corpus = load_corpus(
        options.search_text,
        pruner.tokenizer,
        tokens=PAPER.calibration_tokens + PAPER.fitness_tokens,
        window=PAPER.window,
    )
    calibration, fitness_text = corpus.split(PAPER.calibration_tokens, PAPER.fitness_tokens)
    unseen = consecutive_windows(options.unseen_text, pruner.tokenizer, PAPER.window, WINDOWS).windows
    budget = Budget(pruner.shape, options.beta, p_min=PAPER.p_min, p_max=PAPER.p_max, tied=True)
    schedule = replace(SCHEDULE, evaluations=options.evaluations)
    with prepared(pruner.model, calibration.windows, PAPER) as ready:
        fitness = Fitness(ready.slicer, fitness_text.windows, PAPER.fitness)
        for seed, method in runs:
            key = {"method": method, "beta": options.beta, "seed": seed}
            directory, started = options.work / "-".join(map(str, key.values())), time.perf_counter()
            journal, problem = Journal(directory, key), Problem(budget, population(budget, seed), fitness)
            proposer = proposers(pruner, budget, options.endpoint, directory)[method]()
            outcome = search(proposer, problem, journal, schedule, seed=seed, on_score=_tell)
            scored = [line for line in journal.lines if isinstance(line, RoundLine)]
            yield {
                **key,
                "evaluations": outcome.spent,
                "fitness": round(outcome.best.fitness, 3),
                "best_start": round(outcome.best_seed.fitness, 3),
                "best_from": outcome.best.origin,
                "replies": outcome.counts,
                "tokens": outcome.tokens,
                "minutes": round((time.perf_counter() - started) / 60, 1),
                "curve": [(line.spent, round(line.best, 2)) for line in scored],
                "nats": by_window(ready.slicer, ready.slicer.layers(outcome.best.plan), unseen),
            }


def publish(rows: Sequence[dict[str, Any]], options: argparse.Namespace, dtype: torch.dtype) -> None:
    """Write the rows with what was measured, and how."""
    write(
        "equal_budget",
        f"SmolLM2-135M-Instruct, {dtype}: the paper's settings (preset paper: one rate a layer, Wanda-sp, "
        f"no repair, perplexity on {PAPER.fitness_tokens} tokens of {Path(options.search_text).name}), "
        f"{options.evaluations:g} evaluations for each method, those of the {PAPER.schedule.population} plans of the "
        "starting population included, which is the same for all methods of a seed; minutes: of the last start, where "
        f"a run was stopped, beside other work. Perplexity on {WINDOWS} windows of {PAPER.window} tokens of "
        f"{Path(options.unseen_text).name}, on which nothing was chosen; difference: mean difference in nats a token "
        "from the control with the same seed on the same windows, and its standard error over windows",
        compared(sorted(rows, key=lambda row: (row["beta"], row["seed"], row["method"]))),
        options.output,
    )


def _tell(at: Standing) -> None:
    if at.best is not None and not at.spent % 20:
        print(f"{at.spent:g} evaluations: {at.best.fitness:.2f} ({at.best.origin})", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("--beta", type=float, default=0.3)
    parser.add_argument("--methods", nargs="+", default=["evolution", "random", "cmaes", "cmaes+self", "self"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=float, default=PAPER.schedule.evaluations)
    parser.add_argument(
        "--endpoint", nargs=2, metavar=("URL", "MODEL"), help="an OpenAI-compatible endpoint, for the method endpoint"
    )
    return parser


if __name__ == "__main__":
    main()
