"""Pruned models side by side on unseen text, such as those of two releases: figures of each, and paired differences.

Run: python benchmarks/releases.py WORK UNSEEN_TEXT NAME=DIR NAME=DIR …
(here: WikiText-2 raw, articles b; models that 0.1.0 and today's code made of the same text at β = 0.3)
Each model is compared with the first one. To make that of 0.1.0: `git worktree add ../before 69d87c5`, and there
`selfpruner prune DENSE --beta 0.3 --data SEARCH_TEXT --output DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import Chat, Unseen, paired, write

from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import cross_entropy
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.model_record import read_record


def _named(word: str) -> tuple[str, Path]:
    name, _, directory = word.partition("=")
    return name, Path(directory)


def main() -> None:
    """Measure every model, and compare it with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("unseen_text", metavar="UNSEEN_TEXT")
    parser.add_argument("models", metavar="NAME=DIR", nargs="+", type=_named)
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    options = parser.parse_args()
    dense = load_embedded()
    unseen, chat = Unseen(options.unseen_text, dense.tokenizer), Chat(dense.model, dense.tokenizer, options.work)
    rows, first = [], None
    for name, directory in options.models:
        model, _ = load_model(str(directory), dtype="auto")
        record = read_record(directory)
        row = {"model": name, "beta": record.achieved_beta, "data": record.data}
        nats = [cross_entropy(model, window[None]) for window in unseen.spread]
        first = nats if first is None else first
        row |= {**paired(nats, first), **unseen.perplexities(model), **chat.figures(model)}
        print(row, flush=True)
        rows.append(row)
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16, pruned; perplexity on the first windows of "
        f"{Path(options.unseen_text).name}, on which nothing was chosen: {Unseen.WORDS}; difference: in nats from the "
        f"first model on these {Unseen.SPREAD} windows, paired, with its standard error; {chat.words}"
    )
    write("releases", protocol, rows, options.output)


if __name__ == "__main__":
    main()
