"""Time and result of a search with the paper's settings and its full number of evaluations.

Run: python benchmarks/paper.py SEARCH_TEXT UNSEEN_TEXT [BETA]
(here: WikiText-2 raw, articles a for calibration and search, articles b as the unseen text)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from protocol import write

from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import perplexity
from selfpruner_hub.settings import PRESETS

WINDOW, UNSEEN = 512, 32


def main(search_text: str, unseen_text: str, beta: float) -> None:
    """Search with the paper's settings, and measure the best plan and the uniform one on unseen text."""
    pruner = load_embedded()
    settings = {"preset": "paper", "data": search_text}
    uniform = pruner.prune(beta, evaluations=0, **settings)
    started = time.perf_counter()
    searched = pruner.prune(beta, proposer="self", **settings)
    seconds = time.perf_counter() - started
    windows = consecutive_windows(unseen_text, pruner.tokenizer, WINDOW, UNSEEN).windows
    models = {"dense": pruner.model, "uniform": uniform.model, "searched": searched.model}
    rows = [{"model": name, "perplexity": round(perplexity(model, windows), 2)} for name, model in models.items()]
    for row, made in zip(rows[1:], (uniform, searched), strict=True):
        (fitness,) = (metric.value for name, metric in made.report.metrics.items() if name.startswith("search_"))
        row["search_perplexity"] = fitness
    results = {
        "minutes": round(seconds / 60, 1),
        "evaluations": searched.report.proposer["evaluations"],
        "replies": searched.report.proposer["replies"],
        "tokens": searched.report.proposer["tokens"],
        "best_from": searched.report.proposer["best_from"],
        "models": rows,
    }
    print(results)
    method = PRESETS["paper"]
    write(
        "paper",
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}, β = {beta:g}, preset paper: {method.evaluations:g} evaluations "
        f"on {method.fitness_tokens} tokens, {method.calibration_tokens} calibration tokens, {Path(search_text).name}; "
        f"minutes of the whole `prune`; perplexity on the first {UNSEEN} windows of {WINDOW} tokens of "
        f"{Path(unseen_text).name}, on which nothing was chosen",
        results,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float((sys.argv[3:] or ["0.3"])[0]))
