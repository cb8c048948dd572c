"""What it buys, and costs, to calibrate and search in part on text that the model writes itself.

Run: python benchmarks/own_text.py WORK SEARCH_TEXT UNSEEN_TEXT BETA SHARE …
(here: WikiText-2 raw, articles a for calibration and search, articles b for the figures)
Rows that are in the directory WORK already are taken from there.
"""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

from defaults import pruned
from protocol import Rows, Unseen, write
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.loading import load_model

WINDOW, COUNT = 512, 32
MODULES, CHARACTERS = 40, 3_000
SEED = 1
"""`prune` samples with 0."""


class Other:
    """Texts of other kinds than articles: what the dense model writes, and the last modules of Python's library."""

    def __init__(self, dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, work: Path) -> None:
        modules = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[-MODULES:]
        code = work / "code.txt"
        code.write_text("\n".join(path.read_text(encoding="utf-8", errors="ignore")[:CHARACTERS] for path in modules))
        windows = {
            "own": sample_windows(dense, COUNT, WINDOW, SEED),
            "code": consecutive_windows(str(code), tokenizer, WINDOW, COUNT).windows,
        }
        self._read = {text: (those, teach(dense, those)) for text, those in windows.items()}

    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """KL to the dense model, and perplexity, on each."""
        found = {}
        for text, (windows, teacher) in self._read.items():
            found[f"kl_{text}"] = round(divergence(model, windows, teacher), 4)
            found[f"perplexity_{text}"] = round(perplexity(model, windows), 2)
        return found


def main(work: Path, search_text: str, unseen_text: str, beta: float, shares: list[float]) -> None:
    """Prune with every share, and measure."""
    rows, pruner = Rows(work / "own_text.jsonl"), load_embedded()
    dense = str(work / "dense")
    pruner.model.save_pretrained(dense)
    pruner.tokenizer.save_pretrained(dense)
    unseen, other = Unseen(unseen_text, pruner.tokenizer), Other(pruner.model, pruner.tokenizer, work)
    if not rows.have(share=None):
        rows.keep({"share": None, **unseen.perplexities(pruner.model), **other(pruner.model)})
    for share in shares:
        if not rows.have(share=share):
            output = work / f"b{100 * beta:.0f}-own{100 * share:.0f}"
            row = pruned(dense, beta, search_text, output, unseen, ("--set", f"own_text={share}"))
            rows.keep({"share": share, **row, **other(load_model(str(output), dtype="auto")[0])})
        write(
            "own_text",
            f"SmolLM2-135M-Instruct in bfloat16: `selfpruner prune` with its defaults on {Path(search_text).name}, "
            "save for the share of text that the model writes itself (null: the dense model); perplexity on the first "
            f"windows of {Path(unseen_text).name}, on which nothing was chosen: {Unseen.WORDS}; KL to the dense model "
            f"and perplexity on {COUNT} windows of {WINDOW} tokens: own: written by the dense model with another seed; "
            f"code: the first {CHARACTERS} characters each of the last {MODULES} modules of the standard library of "
            f"Python {platform.python_version()}",
            rows,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4]), [float(share) for share in sys.argv[5:]])
