"""Pruned models side by side on unseen text, such as those of two releases: figures of each, and paired differences.

Run: python benchmarks/releases.py WORK UNSEEN_TEXT NAME=DIR NAME=DIR …
(here: WikiText-2 raw, articles b; the models at β = 0.3 that release_010.py and `defaults.py --alone` save)
Each model is compared with the first one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from protocol import Chat, Unseen, paired, write

from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import cross_entropy
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.model_record import read_record


def main() -> None:
    """Measure every model, and compare it with the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("unseen_text", metavar="UNSEEN_TEXT")
    parser.add_argument("models", metavar="NAME=DIR", nargs="+", help="what a model is called, and where it was saved")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    options = parser.parse_args()
    dense = load_embedded()
    unseen, chat = Unseen(options.unseen_text, dense.tokenizer), Chat(dense.model, dense.tokenizer, options.work)
    rows, first = [], None
    for name, _, directory in (word.partition("=") for word in options.models):
        model, _ = load_model(directory, dtype="auto")
        record = read_record(Path(directory))
        row = {"model": name, "beta": record.achieved_beta, "data": record.data}
        nats = [cross_entropy(model, window[None]) for window in unseen.spread]
        row |= {**(paired(nats, first) if first else {}), **unseen.perplexities(model), **chat.figures(model)}
        first = first or nats
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
