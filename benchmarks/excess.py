"""What the second repair leaves of the loss by which a plan costs more than its layers do alone (`fitness.REMAINS`).

Run: python benchmarks/excess.py WORK SEARCH_TEXT
(here: WikiText-2 raw, articles a; nothing is reported on them)
Rows that are in WORK already are taken from there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median
from typing import Any

from ours import SCHEDULE, WINDOW
from protocol import Rows, write
from torch import Tensor

from selfpruner_hub.budget import Budget
from selfpruner_hub.calibration import calibrate
from selfpruner_hub.compensation import compensate
from selfpruner_hub.corpus import load_corpus
from selfpruner_hub.demo import NAME, load_embedded
from selfpruner_hub.evaluation import divergence, teach
from selfpruner_hub.fisher import output_fisher
from selfpruner_hub.fitness import Fitness
from selfpruner_hub.importance import rank
from selfpruner_hub.losses import LossCurves, loss_alone
from selfpruner_hub.plan import Plan
from selfpruner_hub.presets import Method
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.loop import search
from selfpruner_hub.search.model_proposer import ModelProposer
from selfpruner_hub.search.seeds import knapsack, seeds
from selfpruner_hub.sensitivity import loss_curves
from selfpruner_hub.slicing import Slicer, ordered, slice_model

CALIBRATION, FITNESS, OTHER = 32_768, 16_384, 32_768
BETA = 0.3
WEIGHTS = (1.0, 1.35, 1.75, 4.0)
"""Of the predicted losses of attention beside those of the FFN: plans that cut many KV groups, some, few and none."""


def plans(pruner: AutoPruner, slicer: Slicer, held_out: Tensor, work: Path) -> dict[str, Plan]:
    """Of many kinds, and one that was searched."""
    budget, curves = Budget(pruner.shape, BETA), loss_curves(slicer)
    found = {
        f"attention × {weight:g}": budget.project(
            knapsack(budget, [LossCurves(weight * known.attention, known.ffn) for known in curves])
        )
        for weight in WEIGHTS
    }
    fitness = Fitness(slicer, held_out, "kl", curves)
    return found | {
        "searched by what it costs before the second repair": search(
            ModelProposer(pruner.model, pruner.tokenizer, budget, NAME),
            budget,
            fitness,
            Journal(work / "excess", {"beta": BETA}),
            schedule=SCHEDULE,
            seeds=seeds(budget, curves, fitness.loss),
            probe=fitness.slopes,
        ).best.plan
    }


def main(work: Path, search_text: str) -> None:
    """Repair the plans twice, and see what each repair leaves."""
    pruner, rows = load_embedded(), Rows(work / "excess.jsonl")
    dense, sizes = pruner.model, (CALIBRATION, FITNESS, OTHER)
    corpus = load_corpus(search_text, pruner.tokenizer, tokens=sum(sizes), window=WINDOW)
    calibration, held_out, other = (part.windows for part in corpus.split(*sizes))
    fisher = output_fisher(dense, calibration[: Method.fisher_tokens // WINDOW])
    statistics = calibrate(dense, calibration)
    order = rank(dense, statistics, "obs", fisher=fisher)
    with ordered(dense, order):
        slicer = Slicer(dense, order, statistics, fisher=fisher)
        found = plans(pruner, slicer, held_out, work)
        models = {
            name: (loss_alone(loss_curves(slicer), plan), slice_model(slicer, plan))
            for name, plan in found.items()
            if not rows.have(plan=name)
        }
    del slicer
    texts = {name: (windows, teach(dense, windows)) for name, windows in (("search", held_out), ("other", other))}
    for name, (alone, model) in models.items():
        kept = sum(layer.num_key_value_heads for layer in found[name].layers)
        groups = sum(layer.num_key_value_heads for layer in pruner.shape.dense.layers) - kept
        row: dict[str, Any] = {"plan": name, "kv_groups_removed": groups, "predicted": round(alone, 4)}
        for repair in ("first", "second"):
            if repair == "second":
                compensate(dense, model, calibration, fisher=fisher)
            row |= {f"{repair}_{text}": round(divergence(model, *read), 4) for text, read in texts.items()}
        rows.keep(row | {"remains": round((row["second_search"] - alone) / (row["first_search"] - alone), 3)})
    print("what remains, median:", median(row["remains"] for row in rows))
    write(
        "excess",
        f"SmolLM2-135M-Instruct, {dense.dtype}, β = {BETA}: {CALIBRATION} calibration tokens of "
        f"{Path(search_text).name}; KL to the dense model on another {FITNESS}, those of the search, and on {OTHER} "
        "more, after the first and the second repair; predicted: the sum of the losses of the layers alone; remains: "
        "(second - predicted) / (first - predicted) on the text of the search; plans: least predicted loss with the "
        f"losses of attention times so much, and a search of {SCHEDULE.evaluations:g} evaluations by the KL after the "
        "first repair",
        list(rows),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
