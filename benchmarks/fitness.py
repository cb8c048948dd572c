"""Zero-shot accuracy by fitness: pairs of plans in which KL prefers one plan and perplexity the other.

Run: python benchmarks/fitness.py WORK SEARCH_TEXT TASKS_DIR
(here: WikiText-2 raw, articles a; the task items, without those that the table of methods reports)
Rows that exist in WORK are reused.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import permutations
from math import exp
from pathlib import Path
from random import Random
from statistics import correlation, mean, stdev
from typing import Any

from ours import CALIBRATION, FITNESS, Ours, texts
from protocol import Rows, write
from quality import ABLATED, ITEMS, TASKS

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.metrics import label_loss, mean_losses, teach, teacher_loss
from selfpruner_hub.evaluation.tasks import evaluate_tasks
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.predicted_loss import LossCurves
from selfpruner_hub.plans.seeds import knapsack

PLANS, SPREAD = 48, 1.0
"""Number of plans, and standard deviation of the logarithm of the random factors of their predicted losses."""
PAIRS = 8
MORE = 1000
"""Number of items of each task to choose a fitness by; they follow the items that the table of methods reports."""


def some_plans(budget: ParameterBudget, curves: list[LossCurves]) -> list[Plan]:
    """Plans of least predicted loss after the loss of each part of each layer is multiplied by a random factor."""
    random = Random(0)

    def times() -> float:
        return exp(random.gauss(0, SPREAD))

    varied = [[LossCurves(times() * c.attention, times() * c.ffn) for c in curves] for _ in range(PLANS)]
    return [budget.project(knapsack(budget, those)) for those in varied]


def disagreements(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """Pairs (plan that KL prefers, plan that perplexity prefers), largest disagreement first.

    The disagreement is the smaller of the two differences in loss, each in standard deviations of its loss. A plan is
    in at most one pair.
    """
    losses = [[row[name] for row in rows] for name in ("kl", "nats")]
    scales = [stdev(loss) for loss in losses]

    def odds(pair: tuple[int, int]) -> float:
        kl, nats = ((loss[pair[1]] - loss[pair[0]]) / scale for loss, scale in zip(losses, scales, strict=True))
        return min(kl, -nats)

    found: list[tuple[int, int]] = []
    for pair in sorted(permutations(range(len(rows)), 2), key=odds, reverse=True):
        if odds(pair) > 0 and not {*pair} & {plan for taken in found for plan in taken}:
            found.append(pair)
    return found[:PAIRS]


def later_items(directory: Path, task: str) -> str:
    """The lines of a task file that no other benchmark reads."""
    lines = (directory / f"{task}.jsonl").read_text().splitlines(keepends=True)
    return "".join(lines[ITEMS : ITEMS + MORE])


def score(work: Path, search_text: str, tasks: Path) -> tuple[Rows, Rows]:
    """Score all plans by both losses, and measure the accuracy of the pairs with the largest disagreement."""
    pruner, losses, accuracies = load_embedded(), Rows(work / "losses.jsonl"), Rows(work / "accuracies.jsonl")
    windows = texts(pruner, search_text)
    ours = Ours.of(pruner, calibrate(pruner.model, windows[0]), windows, work)
    plans = some_plans(ParameterBudget(pruner.shape, ABLATED), ours.curves)
    both = teacher_loss(teach(pruner.model, windows[1])), label_loss(windows[1])
    for number, plan in enumerate(plans):
        if not losses.have(plan=number):
            kl, nats = mean_losses(ours.cut(plan)[1], windows[1], *both)
            losses.keep({"plan": number, "kl": round(kl, 5), "nats": round(nats, 5)})
    with tempfile.TemporaryDirectory() as directory:
        for task in TASKS:
            (Path(directory) / f"{task}.jsonl").write_text(later_items(tasks, task))
        for number in (plan for pair in disagreements(losses) for plan in pair):
            if not accuracies.have(plan=number):
                model = ours.cut(plans[number])[1]
                found = evaluate_tasks(model, pruner.tokenizer, TASKS, directory=Path(directory), progress=False)
                by_task = {one.task: round(one.figures["acc"], 4) for one in found}
                accuracies.keep({"plan": number, **by_task, "mean": round(mean(by_task.values()), 4)})
    return losses, accuracies


def main(work: Path, search_text: str, tasks: Path) -> None:
    """Measure, and report the gain in accuracy of one fitness over the other."""
    losses, accuracies = score(work, search_text, tasks)
    known = {row["plan"]: losses[row["plan"]] | row for row in accuracies}
    pairs = [{"kl": known[mine], "perplexity": known[other]} for mine, other in disagreements(losses)]
    gains = [pair["kl"]["mean"] - pair["perplexity"]["mean"] for pair in pairs]
    write(
        "fitness",
        f"SmolLM2-135M-Instruct, torch.bfloat16, β = {ABLATED}, first repair, {CALIBRATION} calibration tokens of "
        f"{Path(search_text).name}; {PLANS} plans of least predicted loss, the losses of each part times the exp of a "
        f"normal number ({SPREAD:g} its standard deviation); KL to the dense model and cross-entropy (nats) on another "
        f"{FITNESS} tokens; the {PAIRS} pairs where the two are most at odds, by the fitness that prefers the plan; "
        f"accuracy on items {ITEMS + 1} to {ITEMS + MORE} of each task, of which no other figure is made; gain: mean "
        "accuracy of the plans that KL prefers less that of the others, and its standard error over pairs",
        {
            "pairs": pairs,
            "gain": round(mean(gains), 4),
            "standard_error": round(stdev(gains) / len(gains) ** 0.5, 4),
            "correlation": round(correlation(*([row[name] for row in losses] for name in ("kl", "nats"))), 3),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
