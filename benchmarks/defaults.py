"""Pruning from the command line with default settings: time, and quality of the pruned model and its answers.

Run: python benchmarks/defaults.py WORK SEARCH_TEXT UNSEEN_TEXT BETA … [--proposer NAME --evaluations N]
(here: WikiText-2 raw, articles a and conversations for calibration and search, articles b for the figures)
Rows that exist in the directory WORK are reused. With a proposer, the run searches, and writes defaults_NAME.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import metadata_save
from protocol import Chat, Rows, Unseen, arguments, write
from transformers import PreTrainedModel

from selfpruner_hub.cli import main as selfpruner
from selfpruner_hub.models.loading import EMBEDDED_MODEL, embedded_model, load_model
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.settings import SEARCH
from selfpruner_hub.storage.model_record import read_record

DATA = "chat+"
"""Prefix of the search text: the default of a model with a chat template."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune the real model at every β, and measure it."""
    options = _parser().parse_args(words)
    work: Path = options.work
    rows, pruner, dense, measured, how, _ = begun(work, options.unseen_text)
    name, search_words, more = "defaults", "", []
    text = f"{DATA}{Path(options.search_text).name} (the default's wikitext2, from a file)"
    if options.proposer:
        name = f"{name}_{options.proposer}"
        search_words = f" and a search of {options.evaluations:g} evaluations by {options.proposer}"
        more += ["--proposer", options.proposer, "--evaluations", str(options.evaluations)]
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16: `selfpruner prune` with its defaults{search_words} on {text}; "
        f"minutes of it; {how}"
    )
    if not rows.have(beta=0.0):
        rows.keep({"beta": 0.0, **measured(pruner.model)})
    for beta in options.betas:
        if not rows.have(beta=beta):
            rows.keep(pruned(dense, beta, DATA + options.search_text, work / f"b{100 * beta:.0f}", measured, more))
        write(name, protocol, sorted(rows, key=lambda row: row["beta"]), options.output)


class Begun(NamedTuple):
    """What is there before a model is pruned."""

    rows: Rows
    pruner: AutoPruner
    dense: str
    """Directory of the dense model."""
    measured: Callable[[PreTrainedModel], dict[str, float]]
    """Figures of a model on the unseen text, on conversations, plain questions and code."""
    words: str
    """How they are measured."""
    chat: Chat
    """Measures on conversations and plain questions."""


def begun(work: Path, unseen_text: str) -> Begun:
    """Save the dense model in WORK, and prepare all that is measured."""
    pruner, dense = AutoPruner.from_pretrained(**embedded_model()), work / "dense"
    unseen, chat = Unseen(unseen_text, pruner.tokenizer), Chat(pruner.model, pruner.tokenizer, work)
    pruner.model.save_pretrained(dense)
    pruner.tokenizer.save_pretrained(dense)
    metadata_save(dense / "README.md", pruner.licence)
    words = (
        f"perplexity on the first windows of {Path(unseen_text).name}, on which nothing was chosen: {Unseen.WORDS}; "
        f"{chat.words}"
    )

    def measured(model: PreTrainedModel) -> dict[str, float]:
        return {**unseen.perplexities(model), **chat.figures(model)}

    return Begun(Rows(work / "rows.jsonl"), pruner, str(dense), measured, words, chat)


def pruned(
    dense: str,
    beta: float,
    data: str,
    output: Path,
    measured: Callable[[PreTrainedModel], dict[str, float]],
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Prune and measure one model, with `more` options; a model that was saved before is only measured."""
    timed, started = output.with_suffix(".json"), time.perf_counter()
    if not timed.exists():
        prune = ["prune", dense, "--base-model", EMBEDDED_MODEL, "--beta", str(beta)]
        if status := selfpruner([*prune, "--data", data, "--output", str(output), *more]):
            sys.exit(status)
        timed.write_text(json.dumps({"minutes": round((time.perf_counter() - started) / 60, 1)}))
    record = read_record(output)
    figures = {
        **json.loads(timed.read_text()),
        "achieved_beta": round(record.achieved_beta, 4),
        **({"search": record.proposer["gains"]} if record.method["schedule"]["evaluations"] else {}),
    }
    model, _ = load_model(str(output), dtype="auto")
    return {"beta": beta, **figures, **measured(model)}


def _parser() -> argparse.ArgumentParser:
    parser = arguments(__doc__)
    parser.add_argument("betas", metavar="BETA", nargs="+", type=float)
    parser.add_argument("--proposer", metavar="NAME", help="who proposes in a search (default: no search)")
    parser.add_argument("--evaluations", metavar="N", type=float, default=SEARCH, help="of the search (%(default)g)")
    return parser


if __name__ == "__main__":
    main()
