"""Effect of the calibration text on the pruned model: number of tokens, window length, kind of text.

Run: python benchmarks/calibration.py WORK SEARCH_TEXT PASSAGES UNSEEN_TEXT
(here: WikiText-2 raw, articles a; short passages of Wikipedia; articles b for the figures)
Rows that exist in WORK are reused.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from ours import groups_removed
from protocol import Rows, write
from torch import Tensor

from selfpruner_hub.calibration.corpus import consecutive_windows, load_corpus
from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.importance import rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.settings import PruneSettings

BETA, WINDOW, FEW = 0.3, 512, 32_768
COUNTS = (8_192, 16_384, FEW, 65_536, 131_072)
WINDOWS = (128, 256, 2048)
MEASURED = ((512, 32), (2048, 8))
"""Lengths, in tokens, and numbers of the first windows of the unseen text."""
SEED_TOKENS = 4096
"""Number of calibration tokens on which the seed plan measures the loss of each part alone."""
OWN = 16
"""Number of 256-token windows that the dense model generates with another random seed, to measure on other text."""


def texts(pruner: AutoPruner, search_text: str, passages: str) -> dict[str, Tensor]:
    """Windows of every calibration text, by its description."""

    def real(path: str, tokens: int, window: int = WINDOW) -> Tensor:
        return load_corpus(path, pruner.tokenizer, tokens=tokens, window=window).windows[: tokens // window]

    own = sample_windows(pruner.model, FEW // WINDOW, WINDOW, seed=0)
    half = FEW // WINDOW // 2
    found = {f"{tokens} tokens": real(search_text, tokens) for tokens in COUNTS}
    found |= {f"{FEW} tokens, windows of {window}": real(search_text, FEW, window) for window in WINDOWS}
    mixed = torch.stack([own[:half], real(search_text, FEW)[:half]], 1).flatten(0, 1)
    return found | {
        f"{FEW} tokens of its own": own,
        f"{FEW} tokens, half of them its own": mixed,
        f"{FEW} tokens of short passages": real(passages, FEW),
    }


class Measure:
    """Measures every model on text that was not used for any choice."""

    def __init__(self, pruner: AutoPruner, unseen_text: str) -> None:
        self._model = pruner.model
        self._unseen = {
            n: consecutive_windows(unseen_text, pruner.tokenizer, n, count).windows for n, count in MEASURED
        }
        self._own = sample_windows(pruner.model, OWN, 256, seed=1)
        self._teacher = teach(pruner.model, self._own)

    def __call__(self) -> dict[str, float]:
        """Perplexity by window length, and KL on text that the dense model generated."""
        found = {f"perplexity_{n}": round(perplexity(self._model, windows), 2) for n, windows in self._unseen.items()}
        return found | {"kl_on_its_own_text": round(divergence(self._model, self._own, self._teacher), 4)}


def run(pruner: AutoPruner, windows: Tensor, measure: Measure) -> dict[str, Any]:
    """Calibrate, then measure the plans of uniform rates and of least predicted loss."""
    model, budget = pruner.model, ParameterBudget(pruner.shape, BETA)
    started = time.perf_counter()
    fisher = output_fisher(model, windows[: max(1, PruneSettings.fisher_tokens // windows.shape[1])])
    statistics = calibrate(model, windows)
    seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seconds": round(seconds, 1)}
    started = time.perf_counter()
    order = rank(model, statistics, "obs", fisher=fisher)
    with ordered(model, order):
        slicer = Slicer(model, order, statistics, fisher=fisher)
        slicer.layers(budget.project(seeds(budget)["uniform"]))
        found["ordering_and_repair_seconds"] = round(time.perf_counter() - started, 1)
        score = Fitness(slicer, windows[: max(1, SEED_TOKENS // windows.shape[1])])
        starts = seeds(budget, slicer.loss_curves(), score.loss)
        for name in ("uniform", "sensitivity"):
            plan = budget.project(starts[name])
            with with_layers(model, slicer.layers(plan)):
                found[name] = {"kv_groups_removed": groups_removed(pruner, plan), **measure()}
    return found


def protocol(pruner: AutoPruner, search_text: str, unseen_text: str) -> str:
    """Describe how the figures were made."""
    measured = ", ".join(f"{count} of {length}" for length, count in MEASURED)
    return (
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}, β = {BETA}, order of OBS, first repair, windows of {WINDOW} "
        f"tokens of {Path(search_text).name} unless a row says otherwise; uniform: FFN rates; sensitivity: rates of "
        "least predicted loss, attention and FFN apart, each measured alone on the first "
        f"{SEED_TOKENS} tokens of the calibration; seconds: sensitivities, calibration; then ordering and "
        "the repair of all layers at uniform rates; perplexity on the first "
        f"windows of {Path(unseen_text).name}, {measured} tokens; KL on {OWN} windows of 256 tokens that the dense "
        "model wrote"
    )


def main(work: Path, search_text: str, passages: str, unseen_text: str) -> None:
    """Measure every calibration text."""
    rows = Rows(work / "calibration.jsonl")
    pruner = load_embedded()
    measure = Measure(pruner, unseen_text)
    for name, windows in texts(pruner, search_text, passages).items():
        if rows.have(text=name):
            continue
        rows.keep({"text": name, **run(pruner, windows, measure)})
        write("calibration", protocol(pruner, search_text, unseen_text), rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
