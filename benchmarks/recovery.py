"""What recovery brings: the same minutes in all with and without it, and the growth with the tokens.

Run: python benchmarks/recovery.py WORK SEARCH_TEXT UNSEEN_TEXT [--minutes M …] [--betas B …] [--tokens N …]
(here: WikiText-2 raw, articles a and what the model writes to train on, articles b for the figures)
Rows that exist in the directory WORK are reused. A row takes its minutes, and five more to be measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from defaults import DATA, begun
from protocol import arguments, write
from transformers import PreTrainedModel

from selfpruner_hub.cli import main as selfpruner
from selfpruner_hub.models.loading import EMBEDDED_MODEL, load_model
from selfpruner_hub.storage.model_record import read_record

BETA = 0.3
"""β of the growth with tokens."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune and recover the real model, and measure it."""
    parser = arguments(__doc__)
    parser.add_argument("--betas", type=float, nargs="*", default=[], metavar="B")
    parser.add_argument("--minutes", type=float, nargs="*", default=[], metavar="M", help="in all")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[], metavar="N", help="growth, from one cut; 0: the cut"
    )
    options = parser.parse_args(words)
    work: Path = options.work
    rows, pruner, dense, measured, how, chat = begun(work, options.unseen_text)

    def figures(model: PreTrainedModel) -> dict[str, float]:
        return {**measured(model), **chat.sampled(model)}

    def keep(row: dict[str, Any]) -> None:
        rows.keep(row)
        write("recovery", protocol, list(rows), options.output)

    data = DATA + options.search_text
    protocol = (
        "SmolLM2-135M-Instruct in bfloat16: `selfpruner prune --minutes`, which cuts and then recovers, and "
        f"`selfpruner recover --tokens` after `prune --recover 0`, on {DATA}{Path(options.search_text).name}; "
        f"minutes in all, or of the recovery; {how}; {chat.SAMPLED}"
    )
    prune = ["prune", dense, "--base-model", EMBEDDED_MODEL, "--data", data]
    if not rows.have(beta=0.0):
        keep({"beta": 0.0, **figures(pruner.model)})
    for beta in options.betas:
        for minutes in options.minutes:
            if not rows.have(beta=beta, asked=minutes):
                output = work / f"b{100 * beta:.0f}-m{minutes:g}"
                ran([*prune, "--beta", beta, "--minutes", minutes], output)
                keep({"beta": beta, "asked": minutes, **of_saved(output, figures)})
    for tokens in options.tokens:
        if not rows.have(beta=BETA, asked_tokens=tokens):
            cut, output = (work / f"b{100 * BETA:.0f}-{name}" for name in ("cut", f"t{tokens}"))
            ran([*prune, "--beta", BETA, "--recover", 0], cut)
            if tokens:
                ran(["recover", cut, "--against", dense, "--data", data, "--tokens", tokens], output)
            else:
                output = cut
            keep({"beta": BETA, "asked_tokens": tokens, **of_saved(output, figures)})


def ran(words: Sequence[Any], output: Path) -> None:
    """Run a verb, and keep how long it took beside its output; an output that is there is left as it is."""
    timed, started = output.with_suffix(".json"), time.perf_counter()
    if timed.exists():
        return
    if status := selfpruner([*map(str, words), "--output", str(output)]):
        sys.exit(status)
    timed.write_text(json.dumps({"minutes": round((time.perf_counter() - started) / 60, 1)}))


def of_saved(output: Path, figures: Callable[[PreTrainedModel], dict[str, float]]) -> dict[str, Any]:
    """Figures of a saved model, with what its record says of the recovery."""
    record = read_record(output)
    model, _ = load_model(str(output), dtype="auto")
    return {
        **json.loads(output.with_suffix(".json").read_text()),
        "calibration_tokens": record.method["calibration_tokens"],
        "tokens": (record.recovery or {}).get("tokens", 0),
        **figures(model),
    }


if __name__ == "__main__":
    main()
