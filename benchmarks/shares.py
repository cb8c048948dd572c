"""What other shares of conversations and articles leave at β = 0.3: the default beside runs with more articles.

Run: python benchmarks/shares.py WORK SEARCH_TEXT UNSEEN_TEXT
(here: WikiText-2 raw, articles a and conversations for calibration and search, articles b for the figures)
Rows that exist in the directory WORK are reused. It takes about 15 minutes for each of the shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defaults import DATA, begun, pruned
from protocol import arguments, write

from selfpruner_hub.settings import PruneSettings

BETA = 0.3
TOKENS = {(1, 1): PruneSettings.calibration_tokens, (2, 3): 73_728, (1, 2): 73_728}
"""Calibration tokens, by the shares of conversations and articles. With fewer conversations to write, there is time to
read more."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune the real model with all shares, and measure it."""
    options = arguments(__doc__).parse_args(words)
    work: Path = options.work
    rows, _, dense, measured, how = begun(work, options.unseen_text)
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16 at β = {BETA:g}: `selfpruner prune` with its defaults but for `shares` and "
        f"`calibration_tokens`, on {DATA}{Path(options.search_text).name}; {how}"
    )
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
