"""Measure the model that `defaults.py` made at β = 0.3, and write its card to `model_cards/`.

Run, after defaults.py: python benchmarks/card.py WORK UNSEEN_TEXT TASKS_DIR
(here: the WORK of defaults.py; WikiText-2 raw, articles b; the task items)
"""

from __future__ import annotations

import sys
from pathlib import Path

from selfpruner_hub.cli import main as selfpruner
from selfpruner_hub.hub.bundle import CARD, collect
from selfpruner_hub.hub.card import render_card
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE

NAME = "smollm2-135m-instruct-b30"
TASKS = "arc_easy,piqa,winogrande"


def main(work: Path, unseen_text: str, tasks: str) -> None:
    """Measure the model and write its card."""
    directory, card = work / "b30", Path(__file__).parents[1] / "model_cards" / NAME
    model = str(directory)
    figures = ["--save", "--against", str(work / "dense")]
    items = ["--tasks", TASKS, "--tasks-dir", tasks, "--limit", "200", "--cache", str(work / "cache")]
    for command in (
        ["evaluate", model, "--data", unseen_text, "--window", "512", "--windows", "32", *figures],
        ["evaluate", model, *items, "--no-chat", *figures],
        ["benchmark", model, "--runtime", "torch", "--dtype", "float32", *figures],
        ["benchmark", model, "--runtime", "gguf", "--dtype", "q8_0", "--exports", str(work / "gguf"), *figures],
    ):
        if status := selfpruner(command):
            sys.exit(status)
    bundle = collect(directory)
    text = render_card(bundle.record, f"me/{NAME}", pictures=list(bundle.pictures), chat=bundle.chat)
    files = {CARD: text.encode(), MODEL_RECORD_FILE: (directory / MODEL_RECORD_FILE).read_bytes(), **bundle.pictures}
    for name, content in files.items():
        (card / name).parent.mkdir(parents=True, exist_ok=True)
        (card / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
