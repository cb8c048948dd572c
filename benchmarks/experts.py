"""What is lost when experts of a trained mixture go: orders, counts by layer, and the repair.

Run: python benchmarks/experts.py WORK [--seeds 0 1 2 3 4] [--steps 300] [--output DIR]
Each seed trains a mixture of its own in about a minute (`trained_mixture`), and keeps it in WORK with the rows, so that
a benchmark that was stopped goes on. The text is pydoc's: three of four topics for training and calibration, the fourth
for the figures.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from protocol import Rows, write
from torch import Tensor
from trained_mixture import STEPS, UNSEEN, WINDOW, texts, trained_mixture, windows_of
from transformers import PreTrainedModel

from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.seeds import knapsack
from selfpruner_hub.plans.uniform import UniformBudget
from selfpruner_hub.pruning.experts import rank_experts
from selfpruner_hub.pruning.importance import LayerOrder
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model

SHARES = (0.25, 0.5, 0.75)
METHODS = {
    "random": ("random", True),
    "frequency": ("frequency", True),
    "REAP": ("reap", True),
    "REAP-sum": ("reap-sum", True),
    "REAP-sum, own counts": ("reap-sum", False),
}
"""Order of the experts, and whether every layer keeps as many, by the name of the method."""
CALIBRATION, FISHER, MEASURED = 128, 64, 64
"""Windows of the calibration text, those of the Fisher information, and those that are measured."""


def main(words: Sequence[str] | None = None) -> None:
    """Prune every seed's mixture by every method, with and without repair, and measure what is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the training")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    options = parser.parse_args(words)
    rows = Rows(options.work / "rows.jsonl")
    protocol = (
        f"qwen2_moe of 4 layers x 32 experts (top-4 of them, and a shared one), trained for {options.steps} steps on "
        f"pydoc's topics but one in {UNSEEN}, float32; order and repair on {CALIBRATION} windows of {WINDOW} tokens of "
        f"the training text, Fisher information on {FISHER}; KL from the whole mixture over the whole vocabulary on "
        f"{MEASURED} windows of the unseen topics, nats per token: mean over seeds with its standard error"
    )
    for seed in options.seeds:
        for row in measured(options.work / f"mixture-{seed}-{options.steps}", seed, options.steps, rows):
            rows.keep(row)
        write("experts", protocol, summary([row for row in rows if row["steps"] == options.steps]), options.output)


def measured(directory: Path, seed: int, steps: int, rows: Rows) -> Iterator[dict[str, Any]]:
    """Yield the rows of a seed that are missing."""
    runs = [
        (method, share)
        for method in METHODS
        for share in SHARES
        if not rows.have(seed=seed, steps=steps, method=method, share=share)
    ]
    if not runs:
        return
    model, tokenizer = trained_mixture(directory, seed, steps)
    known, unseen = (windows_of(text, tokenizer) for text in texts())
    generator = torch.Generator().manual_seed(seed)
    windows = known[torch.randperm(len(known), generator=generator)[:CALIBRATION]]
    unseen = unseen[:MEASURED]
    reference, fisher = log_shares(model, unseen), output_fisher(model, windows[:FISHER])
    shape, ranked = shape_of(model.config), {}
    for method, share in runs:
        importance, uniform = METHODS[method]
        if importance not in ranked and importance != "random":
            ranked[importance] = rank_experts(model, windows, importance, fisher)
        order, curves = ranked.get(importance) or (at_random(shape.dense, generator), [])
        if uniform:
            budget: Budget = UniformBudget(shape, share)
            plan = budget.project(budget.spread([share] * shape.num_layers))
        else:
            budget = Budget(shape, share)
            plan = budget.project(knapsack(budget, curves))
        with ordered(model, order):
            cut = slice_model(Slicer(model), plan)
        row = {"seed": seed, "steps": steps, "method": method, "share": share, "removed": round(shape.beta(plan), 4)}
        row |= {"experts": [w.intermediate_size for w in plan.layers], "kl": divergence(cut, unseen, reference)}
        compensate(model, cut, windows, fisher=fisher)
        yield {**row, "kl_repaired": divergence(cut, unseen, reference)}


def at_random(dense: Plan, generator: torch.Generator) -> list[LayerOrder]:
    """A random order of the experts of every layer."""
    return [
        LayerOrder(torch.arange(w.num_key_value_heads), torch.randperm(w.intermediate_size, generator=generator))
        for w in dense.layers
    ]


@torch.inference_mode()
def log_shares(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Logarithms of the probabilities of all next tokens, `[N, W - 1, V]`."""
    return torch.cat([model(part).logits[:, :-1].log_softmax(-1) for part in windows.split(8)])


def divergence(model: PreTrainedModel, windows: Tensor, reference: Tensor) -> float:
    """KL divergence from a reference, in nats per token."""
    found = log_shares(model, windows)
    return round(float((reference.exp() * (reference - found)).sum(-1).mean()), 6)


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, and their standard errors."""
    found = []
    for share in SHARES:
        for method in METHODS:
            some = [row for row in rows if row["method"] == method and row["share"] == share]
            for name, repaired in (("kl", False), ("kl_repaired", True)):
                values = [row[name] for row in some]
                if values:
                    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
                    told = {"share": share, "method": method, "repaired": repaired, "seeds": len(values)}
                    found.append({**told, "kl": round(mean(values), 5), "standard_error": error and round(error, 5)})
    return found


if __name__ == "__main__":
    main()
