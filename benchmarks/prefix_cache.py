"""Time that the cache of layer prefixes saves in scoring: the same search, from the same seeds, with and without it.

Run: python benchmarks/prefix_cache.py TEXT
(here: WikiText-2 raw, articles a)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from protocol import write

import selfpruner_hub.evaluation.fitness as fitness_module
from selfpruner_hub.calibration.corpus import load_corpus
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import EvolutionProposer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import DEFAULT_RUN

WINDOW, CALIBRATION, FITNESS, BETA = 512, 8_192, 4_096, 0.3
SETTINGS = PruneSettings(evaluations=10)
MEMORY = fitness_module.PREFIX_MEMORY


def main(text: str) -> None:
    """Search with and without the cache, and compare the times."""
    pruner = load_embedded()
    corpus = load_corpus(text, pruner.tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, search_text = (part.windows for part in corpus.split(CALIBRATION, FITNESS))
    fisher = fisher_information(pruner.model, calibration, PruneSettings(), DEFAULT_RUN)
    results: dict[str, Any] = {}
    with prepared(pruner.model, calibration, PruneSettings(), fisher) as ready:
        budget = ParameterBudget(pruner.shape, BETA)
        starts = seeds(budget, ready.curves)
        for name, memory in (("with", MEMORY), ("without", 0), ("with, again", MEMORY), ("without, again", 0)):
            fitness_module.PREFIX_MEMORY = memory
            fitness, seconds = Fitness(ready.slicer, search_text), [0.0]

            def timed(plan: Plan, share: float, fitness: Fitness = fitness, seconds: list[float] = seconds) -> float:
                started = time.perf_counter()
                value = fitness(plan, share)
                seconds[0] += time.perf_counter() - started
                return value

            found = search(EvolutionProposer(budget), Problem(budget, starts, timed), Journal(None, {}), SETTINGS)
            results[name] = {"seconds": round(seconds[0], 1), "best": round(found.best.fitness, 5)}
            print(name, results[name], flush=True)
    saved = 1 - min(results[n]["seconds"] for n in ("with", "with, again")) / min(
        results[n]["seconds"] for n in ("without", "without, again")
    )
    results["share_saved"] = round(saved, 3)
    write(
        "prefix_cache",
        f"SmolLM2-135M-Instruct in bfloat16 at β = {BETA}: seconds of scoring in a search by evolution of "
        f"{SETTINGS.evaluations:g} evaluations on {FITNESS} tokens of {Path(text).name}, the same in all four; the "
        "share saved is of the quicker of two",
        results,
    )


if __name__ == "__main__":
    main(sys.argv[1])
