"""The model of 0.1.0 at β = 0.3 again, by its own code from the plan in its card, without the search: half an hour.

Run: git worktree add ../before 69d87c5
     PYTHONPATH=../before python benchmarks/release_010.py WORK SEARCH_TEXT
(here: WikiText-2 raw, articles a)
It saves the model as WORK/b30, for `releases.py`. The modules that it imports are those of 0.1.0.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import metadata_save
from selfpruner_hub.demo import NAME, load_embedded
from selfpruner_hub.plan import Plan

from selfpruner_hub import pruner
from selfpruner_hub.cli import main as selfpruner

CARD = Path(pruner.__file__).parents[1] / "model_cards" / "smollm2-135m-instruct-b30" / "selfpruner.json"


def main(work: Path, search_text: str) -> None:
    """Prune with the plan of the card in place of the search, and stop if the text is another one."""
    card, dense = json.loads(CARD.read_text()), load_embedded()
    widths, told = card["widths"], card["proposer"]
    plan = Plan.of(widths["intermediate_size"], widths["num_key_value_heads"])
    best = SimpleNamespace(plan=plan, fitness=card["metrics"]["search_fitness"]["value"], origin=told["best_from"])

    def found(*args: Any, **_: Any) -> SimpleNamespace:
        read = [text.record() for text in args[4]]
        if [text["sha256"] for text in read] != [card["data"][name]["sha256"] for name in ("calibration", "fitness")]:
            sys.exit("This is not the text of the card: give the file that 0.1.0 read.")
        elsewhere = tuple(told["gains"]["elsewhere"])
        return SimpleNamespace(best=best, best_seed=best, elsewhere=elsewhere, spent=0.0, counts={}, tokens=0)

    pruner.find_plan = found
    dense.model.save_pretrained(work / "dense")
    dense.tokenizer.save_pretrained(work / "dense")
    metadata_save(work / "dense" / "README.md", dense.licence)
    options = ["--base-model", NAME, "--beta", "0.3", "--data", search_text, "--output", str(work / "b30")]
    sys.exit(selfpruner(["prune", str(work / "dense"), *options]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
