"""Share of the excess (a plan's loss beyond the sum of its layers' predicted losses) to count before the second repair.

Measures `fitness.REMAINS`: the share of the excess that the second repair leaves, and the share with which scores order
plans as their losses after the second repair do.

Run: python benchmarks/excess.py WORK SEARCH_TEXT
(here: WikiText-2 raw, articles a; nothing is reported on them)
Rows that exist in WORK are reused.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from statistics import linear_regression
from typing import Any

from ours import CALIBRATION, FITNESS, Ours, texts
from protocol import Rows, write

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import teach
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.plans.seeds import knapsack

OTHER = 32_768
BETA = 0.3
SHARES = (0.0, 0.3, 0.5, 0.7, 0.8, 1.0)
WEIGHTS = (1.0, 1.35, 1.75, 4.0)
"""Factors of attention's predicted losses relative to the FFN's: plans that cut many, some, few and no KV groups."""


def plans(budget: ParameterBudget, curves: list[LossCurves]) -> dict[str, Plan]:
    """Plans of least predicted loss, with attention's losses multiplied by each of `WEIGHTS`."""
    weighted = {w: [LossCurves(w * known.attention, known.ffn) for known in curves] for w in WEIGHTS}
    return {f"attention × {w:g}": budget.project(knapsack(budget, those)) for w, those in weighted.items()}


def main(work: Path, search_text: str) -> None:
    """Repair the plans twice, and measure the loss after each repair."""
    pruner, rows = load_embedded(), Rows(work / "excess.jsonl")
    dense = pruner.model
    calibration, fitness_text, other = texts(pruner, search_text, OTHER)
    ours = Ours.of(pruner, calibrate(dense, calibration), [calibration, fitness_text], work)
    found = plans(ParameterBudget(pruner.shape, BETA), ours.curves)
    read = {name: (windows, teach(dense, windows)) for name, windows in (("search", fitness_text), ("other", other))}
    for name, plan in found.items():
        if not rows.have(plan=name):
            rows.keep({"plan": name} | ours.losses(plan, read, twice=True))
    write(
        "excess",
        f"SmolLM2-135M-Instruct, {dense.dtype}, β = {BETA}: {CALIBRATION} calibration tokens of "
        f"{Path(search_text).name}; KL to the dense model on another {FITNESS}, those of the search, and on {OTHER} "
        "more, after the first and the second repair; predicted: the sum of the losses of the layers alone; remains: "
        "the slope of (second - predicted) over (first - predicted), by least squares over the plans; in order: pairs "
        "of plans that predicted + share · (first - predicted) puts in the order in which the second repair leaves "
        "them, by that share; plans: least predicted loss with the losses of attention times so much",
        {
            "plans": rows,
            "remains": {text: remains(rows, text) for text in read},
            "in_order": {text: {share: in_order(rows, text, share) for share in SHARES} for text in read},
        },
    )


def remains(rows: list[dict[str, Any]], text: str) -> float:
    """Slope of the excess after the second repair against the excess after the first, over all plans."""
    first, second = ([row[f"{repair}_{text}"] - row["predicted"] for row in rows] for repair in ("first", "second"))
    return round(linear_regression(first, second).slope, 3)


def in_order(rows: list[dict[str, Any]], text: str, share: float) -> str:
    """Count the pairs of plans whose scores have the order of their losses after the second repair."""

    def score(row: dict[str, Any]) -> float:
        return row["predicted"] + share * (row[f"first_{text}"] - row["predicted"])

    pairs = list(combinations(sorted(rows, key=lambda row: row[f"second_{text}"]), 2))
    return f"{sum(score(better) < score(worse) for better, worse in pairs)} of {len(pairs)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
