"""What other shares of conversations and articles leave at β = 0.3: the default beside runs with more articles.

Run: python benchmarks/shares.py WORK SEARCH_TEXT UNSEEN_TEXT
(here: WikiText-2 raw, articles a and conversations for calibration and search, articles b for the figures)
Rows that exist in the directory WORK are reused. It takes about 15 minutes for each of the shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defaults import DATA, pruned
from protocol import Chat, Rows, Unseen, arguments, write
from transformers import PreTrainedModel

from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.settings import PruneSettings

BETA = 0.3
TOKENS = {(1, 1): PruneSettings.calibration_tokens, (2, 3): 73_728, (1, 2): 73_728}
"""Calibration tokens, by the shares of conversations and articles. With fewer conversations to write, there is time to
read more."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune the real model with all shares, and measure it."""
    options = arguments(__doc__).parse_args(words)
    work: Path = options.work
    rows, dense, pruner = Rows(work / "rows.jsonl"), str(work / "dense"), load_embedded()
    unseen, chat = Unseen(options.unseen_text, pruner.tokenizer), Chat(pruner.model, pruner.tokenizer, work)
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16 at β = {BETA:g}: `selfpruner prune` with its defaults but for `shares` and "
        f"`calibration_tokens`, on {DATA}{Path(options.search_text).name}; perplexity on the first "
        f"windows of {Path(options.unseen_text).name}, on which nothing was chosen: {Unseen.WORDS}; {chat.words}"
    )

    def measured(model: PreTrainedModel) -> dict[str, float]:
        return {**unseen.perplexities(model), **chat.figures(model)}

    pruner.model.save_pretrained(dense)
    pruner.tokenizer.save_pretrained(dense)
    for shares, tokens in TOKENS.items():
        name = ":".join(map(str, shares))
        if not rows.have(shares=name):
            more = ["--set", f"shares={list(shares)}", "--set", f"calibration_tokens={tokens}"]
            output = work / name.replace(":", "-")
            found = pruned(dense, BETA, DATA + options.search_text, output, measured, more)
            rows.keep({"shares": name, "tokens": tokens, **found})
        write("shares", protocol, list(rows), options.output)


if __name__ == "__main__":
    main()
