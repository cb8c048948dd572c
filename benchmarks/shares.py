"""What other shares of conversations and articles leave at β = 0.3, with much text (default) and with little.

Run: python benchmarks/shares.py WORK SEARCH_TEXT UNSEEN_TEXT
(here: WikiText-2 raw, articles a and conversations for calibration and search, articles b for the figures)
Rows that exist in the directory WORK are reused. It takes about 12 minutes for each row of the default, and 3 to 5
for each of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from defaults import DATA, begun, pruned
from protocol import arguments, write

from selfpruner_hub.settings import PRESETS, TEXT_SIZES

BETA = 0.3
RUNS = (
    ("default", (1, 1), 65_536),
    ("default", (2, 3), 73_728),
    ("default", (1, 2), 73_728),
    ("draft", (1, 1), 4_096),
    ("draft", (1, 2), 4_096),
)
"""Preset, shares of conversations and articles, and calibration tokens. With fewer conversations to write, there is
time to read more."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune the real model with all shares, and measure it."""
    options = arguments(__doc__).parse_args(words)
    work: Path = options.work
    rows, _, dense, measured, how, _ = begun(work, options.unseen_text)
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16 at β = {BETA:g}: `selfpruner prune` with each preset, but for `shares` and "
        f"`calibration_tokens`, on {DATA}{Path(options.search_text).name}; {how}"
    )
    for preset, shares, tokens in RUNS:
        name = ":".join(map(str, shares))
        if not rows.have(preset=preset, shares=name):
            sizes = {size: getattr(PRESETS[preset], size) for size in TEXT_SIZES}
            changes = {**sizes, "calibration_tokens": tokens, "shares": list(shares)}
            more = ["--preset", preset]
            more += [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
            output = work / f"{preset}-{name.replace(':', '-')}"
            figures = pruned(dense, BETA, DATA + options.search_text, output, measured, more)
            rows.keep({"preset": preset, "shares": name, "tokens": tokens, **figures})
        write("shares", protocol, list(rows), options.output)


if __name__ == "__main__":
    main()
