"""Which fitness keeps zero-shot accuracy: plans searched by KL and by perplexity, and the seed that both begin with.

Run, after quality.py: python benchmarks/fitness.py WORK SEARCH_TEXT UNSEEN_TEXT TASKS_DIR
(here: its directory, where the models are, and what it was given: WikiText-2 raw, articles a and b; the task items)
Rows that are there already are taken from there.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from statistics import mean

from protocol import Rows, Unseen, write
from quality import ABLATED, ITEMS, TASKS, protocol

from selfpruner_hub.demo import load_embedded
from selfpruner_hub.loading import load_model
from selfpruner_hub.tasks import evaluate_tasks

MORE = 1000
"""Items of each task, behind the first ones, which the table of methods reports: these are to choose by."""


def later_items(directory: Path, task: str) -> str:
    """Lines of a task file that no other benchmark reads."""
    lines = (directory / f"{task}.jsonl").read_text().splitlines(keepends=True)
    return "".join(lines[ITEMS : ITEMS + MORE])


def main(work: Path, search_text: str, unseen_text: str, tasks: Path) -> None:
    """Score what each fitness found."""
    pruner = load_embedded()
    rows, unseen = Rows(work / "fitness.jsonl"), Unseen(unseen_text, pruner.tokenizer)
    with tempfile.TemporaryDirectory() as directory:
        for task in TASKS:
            (Path(directory) / f"{task}.jsonl").write_text(later_items(tasks, task))
        for how in ("seed", "kl", "perplexity"):
            if rows.have(plan=how):
                continue
            model, _ = load_model(str(work / f"{how}-{ABLATED}"), dtype="auto")
            scores = evaluate_tasks(model, pruner.tokenizer, TASKS, directory=Path(directory), progress=False)
            accuracy = {score.task: round(score.figures["acc"], 4) for score in scores}
            error = sum(score.errors["acc"] ** 2 for score in scores) ** 0.5 / len(scores)
            found = {"mean": round(mean(accuracy.values()), 4), "standard_error": round(error, 4)}
            rows.keep({"plan": how, **unseen.perplexities(model), **accuracy, **found})
    write(
        "fitness",
        f"β = {ABLATED}, both repairs; all else as in the table of methods, but items {ITEMS + 1} to {ITEMS + MORE} of "
        f"each task: {protocol(search_text, unseen_text, pruner.model.dtype)}",
        list(rows),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
