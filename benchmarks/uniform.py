"""Layers with widths of their own beside one width for all: quality before and after recovery, and speed.

Run: python benchmarks/uniform.py WORK SEARCH_TEXT UNSEEN_TEXT [--betas B …] [--tokens N] [--python PATH]
(here: WikiText-2 raw, articles a and what the model writes to cut and train on, articles b for the figures)
Rows and models that exist in the directory WORK are used again. vLLM is timed where `--python` names its environment.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from columns import COLUMNS, RUNTIME_NAMES, shown
from defaults import DATA, begun
from protocol import Rows, arguments, write
from recovery import of_saved, ran
from serving import compared

from exporters.format import FORMATS
from selfpruner_hub.errors import SelfPrunerError
from selfpruner_hub.models.loading import EMBEDDED_MODEL
from selfpruner_hub.storage.model_record import read_record

WIDTHS = {"own": (), "uniform": ("--uniform",)}
"""Options of `selfpruner prune` by the name of the widths that they make."""
RUNS = (("gguf", "f16"), ("onnx", "float32"), ("vllm", "float32"), ("vllm", "bfloat16"))
"""Runtimes and dtypes."""
SIZES: dict[str, Any] = {"prompts": [128, 512], "new_tokens": 32, "runs": 9}
"""Passes that are timed."""
TOKENS = 65_536
"""Tokens of a recovery."""


def main(words: Sequence[str] | None = None) -> None:
    """Cut, recover, measure and time the real model in both ways at every β."""
    parser = arguments(__doc__)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.2, 0.3, 0.5], metavar="B")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="of each recovery (default: %(default)s)"
    )
    parser.add_argument("--python", type=Path, metavar="PATH", help="the Python of vLLM's environment")
    options = parser.parse_args(words)
    work, data = options.work, DATA + options.search_text
    rows, pruner, dense, measured, how, _ = begun(work, options.unseen_text)
    if not rows.have(beta=0.0):
        rows.keep({"beta": 0.0, **measured(pruner.model)})
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16: `selfpruner prune --recover 0`, with and without `--uniform`, then "
        f"`selfpruner recover --tokens`, on {DATA}{Path(options.search_text).name}; {how}; speed-ups of prefill and "
        f"decode of the cut model (recovery changes no width) over the dense one, medians of {SIZES['runs']} passes in "
        f"turn, prompts of {' and '.join(map(str, SIZES['prompts']))} tokens and {SIZES['new_tokens']} after them"
    )
    kinds = [(beta, widths) for beta in options.betas for widths in WIDTHS]
    for beta, widths in kinds:
        key = {"beta": beta, "widths": widths}
        cut, recovered = (work / f"b{100 * beta:.0f}-{widths}{end}" for end in ("", "-recovered"))
        prune = ["prune", dense, "--base-model", EMBEDDED_MODEL, "--data", data, "--beta", beta, "--recover", 0]
        ran([*prune, *WIDTHS[widths]], cut)
        ran(["recover", cut, "--against", dense, "--data", data, "--tokens", options.tokens], recovered)
        for output, tokens in ((cut, 0), (recovered, options.tokens)):
            if not rows.have(**key, asked_tokens=tokens):
                reached = round(read_record(output).achieved_beta, 4)
                rows.keep({**key, "asked_tokens": tokens, "achieved_beta": reached, **of_saved(output, measured)})
        write("uniform", protocol, with_speed(rows), options.output)
    for beta, widths in kinds:  # after all models are made, so that one quiet hour is enough
        for run in RUNS:
            models = Path(dense), work / f"b{100 * beta:.0f}-{widths}"
            time_in(run, rows, {"beta": beta, "widths": widths}, models, options.python)
        write("uniform", protocol, with_speed(rows), options.output)
    print(shown(with_speed(rows), COLUMNS["uniform"]))


def time_in(
    run: tuple[str, str], rows: Rows, key: dict[str, Any], models: tuple[Path, Path], python: Path | None
) -> None:
    """Time the dense and the cut model in a runtime and dtype, unless that was done or the runtime is not there."""
    name, dtype = run
    key = {**key, "runtime": name, "dtype": dtype}
    elsewhere = FORMATS[name].elsewhere is not None
    if rows.have(**key) or (elsewhere and python is None):
        return
    try:
        cases, versions = compared(models[1].parent, models, run, **SIZES, **({"python": python} if elsewhere else {}))
    except SelfPrunerError as error:  # a library that is missing, for example
        print(f"{RUNTIME_NAMES[name]}, {dtype}: {error}", flush=True)
        return
    for case in cases:
        rows.keep({**key, **case, "versions": versions})


def with_speed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of quality, each with the speed-ups of its widths, by runtime, dtype and length of the prompt."""
    of_model = ("beta", "widths")
    speeds: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for row in rows:
        if "runtime" in row:
            name = f"{row['runtime']}:{row['dtype']}:{row['prompt']}"
            times = {phase: row[f"{phase}_speedup"] for phase in ("prefill", "decode")}
            speeds.setdefault(tuple(row[name] for name in of_model), {})[name] = times
    quality = [{**row} for row in rows if "runtime" not in row]
    quality.sort(key=lambda row: (row["beta"], row.get("widths", ""), row.get("asked_tokens", 0)))
    for row in quality:
        row.pop("minutes", None)  # hours of other work beside it make them say nothing
    return [{**row, "speed": speeds.get(tuple(row.get(name) for name in of_model), {})} for row in quality]


if __name__ == "__main__":
    main()
