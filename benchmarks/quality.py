"""What is left of a model after our pruning and after other training-free methods, at equal removed parameters.

Run: python benchmarks/quality.py SEARCH_TEXT UNSEEN_TEXT BETAS [TASKS_DIR]
(here: WikiText-2 raw, articles a for calibration and search, articles b and the task items for the figures;
0.2,0.3,0.5)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import Flap, block_influence, by_channels, magnitude, taylor, without_blocks
from protocol import write
from torch import nn

from selfpruner_hub.budget import Budget
from selfpruner_hub.calibration import calibrate
from selfpruner_hub.corpus import consecutive_windows, load_corpus
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.evaluation import perplexity, with_layers
from selfpruner_hub.importance import LayerOrder, rank
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.seeds import seeds
from selfpruner_hub.slicing import Slicer, ordered
from selfpruner_hub.tasks import evaluate_tasks

WINDOW, CALIBRATION, FITNESS, EVALUATIONS = 512, 65_536, 8_192, 16
GRADIENT_WINDOWS = 16
"""Calibration windows behind first-order scores; LLM-Pruner takes ten short ones."""
WINDOWS = ((512, 32), (2048, 8))
"""Lengths and counts of the first windows of the unseen text."""
TASKS, ITEMS = ("arc_easy", "piqa", "winogrande"), 200
UNIFORM = {"evaluations": 0, "seeds": ("uniform",)}
OURS: dict[str, dict[str, Any]] = {
    "ours: uniform, first repair": {**UNIFORM, "accumulate": False},
    "ours: uniform, both repairs": UNIFORM,
    "ours: best seed, first repair": {"evaluations": 0, "accumulate": False},
    "ours: best seed, both repairs": {"evaluations": 0},
    "ours: searched by the model itself, both repairs": {"evaluations": EVALUATIONS},
}
"""From the simplest to the whole: what each part buys."""


class Figures:
    """Measures models, each on the same text and items.

    Args:
        pruner: Of the dense model.
        unseen_text: On which nothing is chosen.
        tasks: Directory of the items; None leaves the tasks out.
    """

    def __init__(self, pruner: AutoPruner, unseen_text: str, tasks: Path | None) -> None:
        self._tokenizer = pruner.tokenizer
        self._tasks = tasks
        self._windows = {
            length: consecutive_windows(unseen_text, pruner.tokenizer, length, count).windows
            for length, count in WINDOWS
        }

    def of(self, model: Any) -> dict[str, float]:
        """Perplexities and accuracies."""
        found = {f"perplexity_{n}": round(perplexity(model, windows), 2) for n, windows in self._windows.items()}
        if self._tasks is not None:
            for score in evaluate_tasks(
                model, self._tokenizer, TASKS, directory=self._tasks, limit=ITEMS, progress=False
            ):
                found |= {f"{score.task}_{name}": round(value, 4) for name, value in score.figures.items()}
        return found


def peers(pruner: AutoPruner, windows: Any) -> Callable[[float, Callable[..., None]], None]:
    """Calibrate the other methods, on the same text, and return what measures them under a β."""
    model = pruner.model
    few = windows[:GRADIENT_WINDOWS]
    statistics = calibrate(model, windows)
    known = Flap(model, statistics)
    orders: dict[str, list[LayerOrder]] = {
        "uniform magnitude": by_channels(model, magnitude(model)),
        "uniform first-order Taylor (LLM-Pruner)": by_channels(model, taylor(model, few)),
        "uniform Wanda-sp": rank(model, statistics),
    }
    influence = block_influence(model, few)

    def measure(beta: float, add: Callable[..., None]) -> None:
        budget = Budget(pruner.shape, beta)
        plan = budget.project(seeds(budget)["uniform"])

        def run(method: str, layers: nn.ModuleList) -> None:
            kept = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
            with with_layers(model, layers):
                add(method, beta, 1 - kept / pruner.shape.weights(pruner.shape.dense), model)

        for method, order in orders.items():
            with ordered(model, order):
                run(method, Slicer(model, order, None).layers(plan))
        with ordered(model, known.order):
            run("FLAP with bias", known.layers(model, known.plan(beta)))
        run("whole layers by block influence (ShortGPT)", without_blocks(model, influence, beta))

    return measure


def main(search_text: str, unseen_text: str, betas: list[float], tasks: Path | None) -> None:
    """Measure every method at every β, and write the table after each β."""
    pruner = load_embedded()
    figures = Figures(pruner, unseen_text, tasks)
    rows: list[dict[str, Any]] = []

    def add(method: str, beta: float, achieved: float, model: Any, **more: Any) -> None:
        rows.append({"method": method, "beta": beta, "achieved_beta": round(achieved, 4), **figures.of(model), **more})
        print(rows[-1], flush=True)

    add("dense", 0.0, 0.0, pruner.model)
    corpus = load_corpus(search_text, pruner.tokenizer, tokens=CALIBRATION + FITNESS, window=WINDOW)
    calibration, _ = corpus.split(CALIBRATION, FITNESS)
    measure_peers = peers(pruner, calibration.windows)
    for beta in betas:
        measure_peers(beta, add)
        for method, settings in OURS.items():
            started = time.perf_counter()
            pruned = pruner.prune(
                beta,
                data=search_text,
                window=WINDOW,
                calibration_tokens=CALIBRATION,
                fitness_tokens=FITNESS,
                **settings,
            )
            minutes = round((time.perf_counter() - started) / 60, 1)
            add(method, beta, pruned.report.achieved_beta, pruned.model, minutes=minutes)
        write(
            "quality",
            f"SmolLM2-135M-Instruct, {pruner.model.dtype}; {CALIBRATION} calibration tokens of "
            f"{Path(search_text).name} for all (the first {GRADIENT_WINDOWS} windows of {WINDOW} for Taylor and block "
            f"influence), another {FITNESS} for our search of {EVALUATIONS} full-evaluation equivalents; uniform: FFN "
            f"rates; perplexity on the first windows of {Path(unseen_text).name}, on which nothing was chosen: "
            f"{', '.join(f'{count} of {length} tokens' for length, count in WINDOWS)}; tasks: the first {ITEMS} items",
            rows,
        )


if __name__ == "__main__":
    main(
        sys.argv[1],
        sys.argv[2],
        [float(beta) for beta in sys.argv[3].split(",")],
        Path(sys.argv[4]) if len(sys.argv) > 4 else None,
    )
