"""Speed-up of scoring candidates with two Ray workers instead of one.

Run: python benchmarks/workers.py SEARCH_TEXT [WORKERS …]
(here: WikiText-2 raw, articles a; 1 2)
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import numpy as np
import ray
from protocol import write

from selfpruner_hub.calibration.corpus import load_corpus
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.pruning.prepare import prepared
from selfpruner_hub.search.proposers import random_rates
from selfpruner_hub.search.ray_workers import THREADS, ray_workers
from selfpruner_hub.settings import PruneSettings

BETA, WINDOW, CALIBRATION, FITNESS = 0.3, 512, 4_096, 2_048
CANDIDATES, ROUNDS = 12, 3


def timed(fitness: Fitness, plans: list[Plan], others: list[Plan], processors: int) -> tuple[float, list[float]]:
    """Score all plans after a warm-up of the workers on `others`; return the seconds and the scores."""
    ray.init(num_cpus=processors, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with ray_workers(fitness) as pool:
            list(pool(others[:processors], 1.0))
            started = time.perf_counter()
            scores = list(pool(plans, 1.0))
            return time.perf_counter() - started, scores
    finally:
        ray.shutdown()


def main(search_text: str, counts: list[int]) -> None:
    """Score the same plans with each number of workers in turn, several times."""
    pruner = load_embedded()
    corpus = load_corpus(search_text, pruner.tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, fitness_text = corpus.split(CALIBRATION, FITNESS)
    budget, drawn = ParameterBudget(pruner.shape, BETA), np.random.default_rng(0)
    drawings = [budget.project(random_rates(budget, drawn)) for _ in range(CANDIDATES + max(counts))]
    plans, others = drawings[:CANDIDATES], drawings[CANDIDATES:]
    taken: dict[int, list[float]] = {count: [] for count in counts}
    found = []
    with prepared(pruner.model, calibration.windows, PruneSettings(importance="wanda-sp")) as ready:
        fitness = Fitness(ready.slicer, fitness_text.windows)
        for _ in range(ROUNDS):
            for count in counts:
                seconds, scores = timed(fitness, plans, others, count)
                taken[count].append(seconds)
                found.append(scores)
                print(count, round(seconds, 2), flush=True)
    first = counts[0]
    speedups = {n: statistics.median(a / b for a, b in zip(taken[first], taken[n], strict=True)) for n in counts}
    write(
        "workers",
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}: seconds to score {CANDIDATES} random plans on {FITNESS} tokens "
        f"of {Path(search_text).name} by Ray workers of {THREADS} thread each, warm, {ROUNDS} rounds in turn; speed"
        f"-up: median over rounds, against {first} worker; equal: whether all scores were the same to the bit",
        {
            "seconds": {n: [round(each, 2) for each in times] for n, times in taken.items()},
            "speedup": {n: round(value, 3) for n, value in speedups.items()},
            "equal": all(scores == found[0] for scores in found),
        },
    )


if __name__ == "__main__":
    main(sys.argv[1], [int(count) for count in sys.argv[2:]] or [1, 2])
