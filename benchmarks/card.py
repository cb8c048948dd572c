"""Make the pruned model whose card lies in `model_cards/`, measure it, and write the card.

Run: python benchmarks/card.py WORK SEARCH_TEXT UNSEEN_TEXT TASKS_DIR
(here: WikiText-2 raw, articles a for calibration and search, articles b and the task items for the figures)
Whatever is finished already in the directory WORK is taken from there.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from protocol import write

from selfpruner_hub.cli import main as selfpruner
from selfpruner_hub.demo import load_embedded
from selfpruner_hub.progress import Bars

NAME, BETA = "smollm2-135m-instruct-b30", 0.3
TASKS = "arc_easy,piqa,winogrande"


def make(work: Path, text: str) -> None:
    """Save the dense model and the pruned one, and write how long the latter took."""
    if (work / NAME / "selfpruner.json").is_file():
        return
    pruner = load_embedded()
    pruner.model.save_pretrained(work / "dense")
    pruner.tokenizer.save_pretrained(work / "dense")
    started, stages = time.perf_counter(), dict[str, float]()
    with Bars() as bars:

        def report(what: str, done: float, total: float, *notes: str) -> None:
            bars(what, done, total, *notes)
            stages[what] = time.perf_counter() - started

        pruned = pruner.prune(BETA, data=text, run_dir=work / "run", progress=report)
    pruned.save_pretrained(work / NAME)
    ends = {**stages, "in all": time.perf_counter() - started}
    write(
        "card",
        f"SmolLM2-135M-Instruct, {pruner.model.dtype}, β = {BETA}: minutes from the start to the end of each stage of "
        f"prune() with its defaults on {Path(text).name}",
        {what: round(seconds / 60, 1) for what, seconds in ends.items()},
    )


def main(work: Path, search_text: str, unseen_text: str, tasks: str) -> None:
    """Make, measure, describe."""
    make(work, search_text)
    model, card = str(work / NAME), str(Path(__file__).parents[1] / "model_cards" / NAME)
    figures = ["--save", "--against", str(work / "dense")]
    items = ["--tasks", TASKS, "--tasks-dir", tasks, "--limit", "200", "--cache", str(work / "cache")]
    for command in (
        ["evaluate", model, "--data", unseen_text, "--window", "512", "--windows", "32", *figures],
        ["evaluate", model, *items, *figures],
        ["benchmark", model, "--runtime", "torch", "--dtype", "float32", *figures],
        ["benchmark", model, "--runtime", "gguf", "--dtype", "q8_0", "--exports", str(work / "gguf"), *figures],
        ["card", model, f"me/{NAME}", "--output", card],
    ):
        if status := selfpruner(command):
            sys.exit(status)
    shutil.copy(work / NAME / "selfpruner.json", card)  # the record that the card was made from


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
