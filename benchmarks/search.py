"""Who searches better: the model itself, evolution or random, from the same seeds with equal evaluations.

Run: python benchmarks/search.py SEARCH_TEXT UNSEEN_TEXT [BETA …]
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text)
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from protocol import write

from selfpruner_hub.budget import Budget
from selfpruner_hub.calibration import calibrate
from selfpruner_hub.corpus import consecutive_windows, load_corpus
from selfpruner_hub.demo import NAME, load_embedded
from selfpruner_hub.evaluation import perplexity, with_layers
from selfpruner_hub.fitness import Fitness
from selfpruner_hub.importance import rank
from selfpruner_hub.plan import Plan
from selfpruner_hub.pruner import SENSITIVITY_TOKENS
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.loop import search
from selfpruner_hub.search.model_proposer import ModelProposer
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer
from selfpruner_hub.search.schedule import Schedule
from selfpruner_hub.search.seeds import seeds
from selfpruner_hub.sensitivity import loss_curves, output_sensitivity
from selfpruner_hub.slicing import Slicer, ordered

WINDOW, CALIBRATION, FITNESS, UNSEEN = 512, 131_072, 8_192, 32
EVALUATIONS, SEEDS = 24, (0, 1, 2)


def main(search_text: str, unseen_text: str, betas: list[float]) -> None:
    """Run every proposer with every seed at every β, and measure what it found on unseen text."""
    pruner = load_embedded()
    model, tokenizer = pruner.model, pruner.tokenizer
    corpus = load_corpus(search_text, tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, held_out = corpus.split(CALIBRATION, FITNESS)
    unseen = consecutive_windows(unseen_text, tokenizer, WINDOW, UNSEEN).windows
    known = calibrate(model, calibration.windows)
    sensitivity = output_sensitivity(model, calibration.windows[: SENSITIVITY_TOKENS // WINDOW])
    order = rank(model, known)
    rows: list[dict[str, Any]] = []
    with ordered(model, order):
        slicer = Slicer(model, order, known)
        del known
        fitness = Fitness(slicer, held_out.windows)

        def measured(plan: Plan) -> float:
            with with_layers(model, slicer.layers(plan)):
                return round(perplexity(model, unseen), 2)

        def add(**row: Any) -> None:
            rows.append(row)
            print(row, flush=True)

        add(beta=0.0, method="dense", kl=0.0, unseen_perplexity=round(perplexity(model, unseen), 2))
        for beta in betas:
            budget = Budget(pruner.shape, beta)
            cut = Slicer(model, order, None).layers(budget.project(seeds(budget)["uniform"]))
            with with_layers(model, cut):
                add(beta=beta, method="uniform, no repair", unseen_perplexity=round(perplexity(model, unseen), 2))
            starts = seeds(budget, loss_curves(sensitivity, slicer))
            for name, rates in starts.items():
                plan = budget.project(rates)
                add(beta=beta, method=f"seed: {name}", kl=round(fitness(plan), 4), unseen_perplexity=measured(plan))
            for seed in SEEDS:
                for proposer in (
                    ModelProposer(model, tokenizer, budget, NAME),
                    EvolutionProposer(budget),
                    RandomProposer(budget),
                ):
                    started = time.perf_counter()
                    found = search(
                        proposer,
                        budget,
                        fitness,
                        Journal(None, {}),
                        schedule=Schedule(EVALUATIONS, population=8, crossover=8, mutation=8),
                        seeds=starts,
                        seed=seed,
                    )
                    add(
                        beta=beta,
                        method=proposer.name,
                        seed=seed,
                        kl=round(found.best.fitness, 4),
                        unseen_perplexity=measured(found.best.plan),
                        best_from=found.best.origin,
                        evaluations=found.spent,
                        replies=found.counts,
                        seconds=round(time.perf_counter() - started),
                    )
    for beta in betas:
        for method in ("self", "evolution", "random"):
            runs = [r for r in rows if r["beta"] == beta and r["method"] == method]
            add(
                beta=beta,
                method=f"{method}, median of {len(runs)}",
                kl=statistics.median(r["kl"] for r in runs),
                unseen_perplexity=statistics.median(r["unseen_perplexity"] for r in runs),
            )
    write(
        "search",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}; {calibration.tokens} calibration and {held_out.tokens} fitness "
        f"tokens of {Path(search_text).name}, windows of {WINDOW}; KL on those; {EVALUATIONS} full-evaluation "
        f"equivalents each (seeds included), seeds {list(SEEDS)}; perplexity on the first {UNSEEN} windows of {WINDOW} "
        f"tokens of {Path(unseen_text).name}, which nothing was chosen on",
        rows,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [float(b) for b in sys.argv[3:]] or [0.3, 0.5])
