"""The whole command line with its defaults: how long it takes, and what is left of the model.

Run: python benchmarks/defaults.py WORK SEARCH_TEXT UNSEEN_TEXT BETA …
(here: WikiText-2 raw, articles a for calibration and search, articles b for the figures)
Whatever is finished already in the directory WORK is taken from there; a run that was stopped goes on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from protocol import Rows, write

from selfpruner_hub.cli import main as selfpruner
from selfpruner_hub.corpus import consecutive_windows
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.evaluation import perplexity
from selfpruner_hub.loading import load_model
from selfpruner_hub.records import read_record

WINDOWS = ((512, 32), (2048, 8))
"""Lengths and counts of the first windows of the unseen text."""


def figures(model: str, text: str) -> dict[str, float]:
    """Perplexities of a saved model, in the dtype that it has."""
    loaded, tokenizer = load_model(model, dtype="auto")
    cases = [(length, consecutive_windows(text, tokenizer, length, count).windows) for length, count in WINDOWS]
    return {f"perplexity_{length}": round(perplexity(loaded, windows), 2) for length, windows in cases}


def main(work: Path, search_text: str, unseen_text: str, betas: list[float]) -> None:
    """Prune the real model at every β, and measure."""
    rows, dense = Rows(work / "rows.jsonl"), str(work / "dense")
    if not rows.have(beta=0.0):
        pruner = load_embedded()
        pruner.model.save_pretrained(dense)
        pruner.tokenizer.save_pretrained(dense)
        rows.keep({"beta": 0.0, **figures(dense, unseen_text)})
    for beta in betas:
        if rows.have(beta=beta):
            continue
        output, started = work / f"b{100 * beta:.0f}", time.perf_counter()
        command = ["prune", dense, "--beta", str(beta), "--data", search_text, "--output", str(output)]
        if status := selfpruner([*command, "--run-dir", str(work / f"run-{beta}")]):
            sys.exit(status)
        minutes, record = (time.perf_counter() - started) / 60, read_record(output)
        found = {
            "achieved_beta": round(record.achieved_beta, 4),
            "logit_scale": record.metrics["search_logit_scale"].value,
        }
        rows.keep({"beta": beta, "minutes": round(minutes, 1), **found, **figures(str(output), unseen_text)})
    write(
        "defaults",
        f"SmolLM2-135M-Instruct in bfloat16: `selfpruner prune` with its defaults on {Path(search_text).name}; minutes "
        f"of it; perplexity on the first windows of {Path(unseen_text).name}, on which nothing was chosen: "
        f"{', '.join(f'{count} of {length} tokens' for length, count in WINDOWS)}",
        sorted(rows, key=lambda row: row["beta"]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], [float(beta) for beta in sys.argv[4:]])
