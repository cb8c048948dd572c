"""Who searches better: the model itself, evolution or random, from the same seeds with equal evaluations.

Run: python benchmarks/search.py SEARCH_TEXT UNSEEN_TEXT BETA
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text; β = 0.3 and 0.5)
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
from selfpruner_hub.evaluation import divergence, perplexity, teach, with_layers
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

WINDOW, CALIBRATION, FITNESS, UNSEEN = 512, 131_072, 16_384, 32
EVALUATIONS, SEEDS = 20, (0, 1, 2)
SCHEDULE = Schedule(EVALUATIONS, population=4, crossover=8, mutation=8)


def main(search_text: str, unseen_text: str, beta: float) -> None:
    """Run every proposer with every seed, and measure what it found on unseen text."""
    pruner = load_embedded()
    model, tokenizer = pruner.model, pruner.tokenizer
    corpus = load_corpus(search_text, tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, held_out = corpus.split(CALIBRATION, FITNESS)
    unseen = consecutive_windows(unseen_text, tokenizer, WINDOW, UNSEEN).windows
    sensitivity = output_sensitivity(model, calibration.windows[: SENSITIVITY_TOKENS // WINDOW])
    known = calibrate(model, calibration.windows)
    order = rank(model, known)
    rows: list[dict[str, Any]] = []
    with ordered(model, order):
        slicer = Slicer(model, order, known)
        del known
        curves = loss_curves(sensitivity, slicer)
        fitness = Fitness(slicer, held_out.windows, "kl", curves)
        teacher = teach(model, unseen)

        def measured(layers: Any) -> dict[str, float]:
            with with_layers(model, layers):
                kl, value = divergence(model, unseen, teacher), perplexity(model, unseen)
            return {"unseen_kl": round(kl, 4), "unseen_perplexity": round(value, 2)}

        def add(**row: Any) -> None:
            rows.append(row)
            print({key: value for key, value in row.items() if key != "curve"}, flush=True)

        def scored(plan: Plan) -> dict[str, float]:
            return {"kl": round(fitness(plan), 4), **measured(slicer.layers(plan))}

        budget = Budget(pruner.shape, beta)
        starts = seeds(budget, curves)
        add(method="dense", kl=0.0, **measured(model.get_decoder().layers))
        add(
            method="uniform, no repair",
            **measured(Slicer(model, order, None).layers(budget.project(starts["uniform"]))),
        )
        for name, rates in starts.items():
            add(method=f"seed: {name}", **scored(budget.project(rates)))
        for seed in SEEDS:
            for proposer in (
                ModelProposer(model, tokenizer, budget, NAME),
                EvolutionProposer(budget),
                RandomProposer(budget),
            ):
                started, journal = time.perf_counter(), Journal(None, {})
                found = search(
                    proposer,
                    budget,
                    fitness,
                    journal,
                    schedule=SCHEDULE,
                    seeds=starts,
                    seed=seed,
                    probe=fitness.slopes if getattr(proposer, "reads_slopes", False) else None,
                )
                add(
                    method=proposer.name,
                    seed=seed,
                    **scored(found.best.plan),
                    best_from=found.best.origin,
                    evaluations=found.spent,
                    replies=found.counts,
                    seconds=round(time.perf_counter() - started),
                    curve=[(r["spent"], round(r["best"], 4)) for r in journal.records if r["kind"] == "round"],
                )
    for method in ("self", "evolution", "random"):
        runs = [row for row in rows if row["method"] == method]
        figures = ("kl", "unseen_kl", "unseen_perplexity")
        add(method=f"{method}, median of {len(runs)}", **{f: statistics.median(r[f] for r in runs) for f in figures})
    write(
        f"search-{beta:g}",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}, β = {beta:g}; {calibration.tokens} calibration and "
        f"{held_out.tokens} fitness tokens of {Path(search_text).name}, stretches without common articles, windows of "
        f"{WINDOW}; KL to the dense model on the latter; {EVALUATIONS} full-evaluation equivalents each (seeds and "
        f"probes included), seeds {list(SEEDS)}; first repair only; unseen: the first {UNSEEN} windows of {WINDOW} "
        f"tokens of {Path(unseen_text).name}, on which nothing was chosen",
        rows,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]))
