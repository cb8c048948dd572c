"""Comparison of proposers (the model itself, evolution, random), from the same seeds with equal evaluations.

Run: python benchmarks/search.py SEARCH_TEXT UNSEEN_TEXT BETA [METHODS]
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text; β = 0.3 with all methods,
0.5 with self,evolution,random)
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from protocol import PICTURES, write

from selfpruner_hub.calibration.corpus import consecutive_windows, load_corpus
from selfpruner_hub.cli.demo import NAME, load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import label_loss, mean_losses, teach, teacher_loss
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.search.journal import Journal, RoundLine
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import EvolutionProposer, Proposer, RandomProposer
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import DEFAULT_RUN

WINDOW, CALIBRATION, FITNESS, UNSEEN = 512, 65_536, 8_192, 32
EVALUATIONS, SEEDS = 18, (0, 1, 2)
SETTINGS = PruneSettings(evaluations=EVALUATIONS, population=4, probe_share=0.5)
CHANCE = 50.0
"""Temperature at which the model's choice among what the schema allows is almost uniform."""


def proposers(pruner: Any, budget: ParameterBudget) -> dict[str, Proposer]:
    """All proposers; "chance" has the model's prompts, measurements and schema, but an almost uniform choice."""
    model, tokenizer = pruner.model, pruner.tokenizer
    return {
        "self": ModelProposer(model, tokenizer, budget, NAME, SETTINGS),
        "chance": ModelProposer(model, tokenizer, budget, NAME, replace(SETTINGS, temperature=CHANCE), name="chance"),
        "evolution": EvolutionProposer(budget),
        "random": RandomProposer(budget),
    }


class Unseen:
    """Measures candidates on text that was not used for any choice; each plan is measured once."""

    def __init__(self, slicer: Slicer, windows: Any) -> None:
        self._slicer = slicer
        self._windows = windows
        self._losses = teacher_loss(teach(slicer.model, windows)), label_loss(windows)
        self._known: dict[Plan, dict[str, float]] = {}

    def __call__(self, plan: Plan) -> dict[str, float]:
        """KL and perplexity of a plan after the first repair."""
        if plan not in self._known:
            self._known[plan] = self.of(self._slicer.layers(plan))
        return self._known[plan]

    def of(self, layers: Any) -> dict[str, float]:
        """KL and perplexity of any decoder layers."""
        with with_layers(self._slicer.model, layers) as model:
            kl, entropy = mean_losses(model, self._windows, *self._losses)
        return {"unseen_kl": round(kl, 4), "unseen_perplexity": round(math.exp(entropy), 2)}


def draw(rows: Sequence[dict[str, Any]], beta: float, path: Path) -> None:
    """Plot the best fitness so far against the evaluations spent, with a line for each run."""
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    colours = dict(zip(("self", "chance", "evolution", "random"), ("C0", "C2", "C1", "C7"), strict=True))
    for method, colour in colours.items():
        runs = [row["curve"] for row in rows if row["method"] == method]  # empty if the method was left out
        for number, curve in enumerate(runs):
            x, y = np.array(curve).T
            axes.step(x, y, where="post", color=colour, alpha=0.8, label=method if number == 0 else None)
    axes.set_xlabel("full-evaluation equivalents")
    axes.set_ylabel("KL on the search text, best so far")
    axes.set_title(f"SmolLM2-135M-Instruct, β = {beta:g}")
    axes.legend()
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main(search_text: str, unseen_text: str, beta: float, methods: Sequence[str]) -> None:
    """Run every proposer with every random seed, and measure its best plan on unseen text."""
    pruner = load_embedded()
    model, tokenizer = pruner.model, pruner.tokenizer
    corpus = load_corpus(search_text, tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, fitness_text = corpus.split(CALIBRATION, FITNESS)
    fisher = fisher_information(model, calibration.windows, PruneSettings(), DEFAULT_RUN)
    rows: list[dict[str, Any]] = []

    def add(**row: Any) -> None:
        rows.append(row)
        print({key: value for key, value in row.items() if key != "curve"}, flush=True)

    with prepared(model, calibration.windows, PruneSettings(), fisher) as ready:
        slicer, curves = ready.slicer, ready.curves
        fitness = Fitness(slicer, fitness_text.windows, "kl")
        score, measure_steps = (
            cache(fitness),
            cache(partial(fitness.measure_steps, curves=curves)),
        )  # runs share scores of plans; each still pays for all plans that it asks for
        unseen = Unseen(slicer, consecutive_windows(unseen_text, tokenizer, WINDOW, UNSEEN).windows)
        budget = ParameterBudget(pruner.shape, beta)
        starts = seeds(budget, curves, fitness.loss)
        uniform = budget.project(starts["uniform"])
        add(method="dense", kl=0.0, **unseen.of(model.get_decoder().layers))
        add(method="uniform, no repair", **unseen.of(Slicer(model, ready.order, None).layers(uniform)))
        for name, rates in starts.items():
            plan = budget.project(rates)
            add(method=f"seed: {name}", kl=round(score(plan, 1.0), 4), **unseen(plan))
        for seed in SEEDS:
            for name in methods:
                proposer, journal = proposers(pruner, budget)[name], Journal(None, {})
                probe = measure_steps if getattr(proposer, "reads_slopes", False) else None
                found = search(proposer, Problem(budget, starts, score, probe), journal, SETTINGS, seed=seed)
                add(
                    method=name,
                    seed=seed,
                    kl=round(found.best.fitness, 4),
                    **unseen(found.best.plan),
                    best_from=found.best.origin,
                    evaluations=found.spent,
                    replies=found.counts,
                    curve=[(line.spent, round(line.best, 4)) for line in journal.lines if isinstance(line, RoundLine)],
                )
    for method in methods:
        runs = [row for row in rows if row["method"] == method]
        figures = ("kl", "unseen_kl", "unseen_perplexity")
        add(method=f"{method}, median of {len(runs)}", **{f: statistics.median(r[f] for r in runs) for f in figures})
    draw(rows, beta, PICTURES / f"search-{beta:g}.png")
    write(
        f"search-{beta:g}",
        f"SmolLM2-135M-Instruct, {str(model.dtype)}, β = {beta:g}; {calibration.tokens} calibration and "
        f"{fitness_text.tokens} fitness tokens of {Path(search_text).name}, stretches without common articles, windows "
        f"of {WINDOW}; KL to the dense model on the latter; {EVALUATIONS} full-evaluation equivalents each (seeds and "
        f"probes included), seeds {list(SEEDS)}; first repair only; unseen: the first {UNSEEN} windows of {WINDOW} "
        f"tokens of {Path(unseen_text).name}, on which nothing was chosen",
        rows,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), (sys.argv[4:] or ["self,chance,evolution,random"])[0].split(","))
