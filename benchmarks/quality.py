"""Quality of a model after our pruning and after other training-free methods, at equal removed parameters.

Run: python benchmarks/quality.py WORK SEARCH_TEXT UNSEEN_TEXT BETAS [TASKS_DIR]
(here: WikiText-2 raw, articles a for calibration and search, articles b and the task items for the figures;
0.3,0.2,0.5)
Rows that exist in WORK are reused.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from ours import CALIBRATION, FITNESS, SETTINGS, WINDOW, Ours, removed, texts
from peers import Flap, block_influence, by_channels, magnitude, taylor, without_blocks
from protocol import Rows, Unseen, write
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.statistics import LayerStatistics, calibrate
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.evaluation.tasks import evaluate_tasks
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.slicing import Slicer

GRADIENT_WINDOWS = 16
"""Number of calibration windows for first-order scores; LLM-Pruner takes ten short ones."""
TASKS, ITEMS = ("arc_easy", "piqa", "winogrande"), 100
ABLATED = 0.3
"""β at which each part of our method is also measured alone."""

Measured = Callable[[], tuple[float, PreTrainedModel]]
"""Function that makes a model, and returns the removed share of the prunable weights and the model."""


class Table:
    """Rows of figures, all on the same text and items; each is saved at once.

    Args:
        work: Directory of the rows.
        pruner: Pruner of the dense model.
        unseen_text: Path of a text that is not used for any choice.
        tasks: Directory of the task items; None leaves the tasks out.
        protocol: Description of how the figures are made.
    """

    def __init__(self, work: Path, pruner: AutoPruner, unseen_text: str, tasks: Path | None, protocol: str) -> None:
        self._protocol = protocol
        self.rows = Rows(work / "rows.jsonl")
        self._tokenizer, self._tasks = pruner.tokenizer, tasks
        self._unseen = Unseen(unseen_text, pruner.tokenizer)

    def add(self, method: str, beta: float, made: Measured) -> None:
        """Make and measure a model, if its row is missing."""
        if self.rows.have(method=method, beta=beta):
            return
        started = time.perf_counter()
        removed, model = made()
        minutes = round((time.perf_counter() - started) / 60, 1)
        made_so = {"method": method, "beta": beta, "removed": round(removed, 4), "minutes": minutes}
        self.rows.keep({**made_so, **self._figures(model)})
        self.write()

    def write(self) -> None:
        """Write the rows so far to quality.json."""
        write("quality", self._protocol, sorted(self.rows, key=lambda row: row["beta"]))

    def show(self) -> None:
        """Print a line for each method: perplexity in short and long windows and mean accuracy, at every β."""
        betas = sorted({row["beta"] for row in self.rows} - {0.0})

        def figure(row: dict[str, Any], name: str) -> str:
            if name == "accuracy":
                return f"{100 * mean(row[f'{task}_acc'] for task in TASKS):.0f}"
            return f"{row[name]:.1f}"

        wanted = [*self._unseen.NAMES, *([] if self._tasks is None else ["accuracy"])]
        print("|".join(["", "method", *(f"{name}, {beta}" for name in wanted for beta in betas), ""]))
        print("|".join(["", "---", *("---:" for _ in wanted for _ in betas), ""]))
        for method in dict.fromkeys(row["method"] for row in self.rows):
            found = {row["beta"]: row for row in self.rows if row["method"] == method}
            rows = {beta: found.get(beta, found.get(0.0)) for beta in betas}  # dense: the same at every β
            cells = ("–" if rows[b] is None else figure(rows[b], name) for name in wanted for b in betas)
            print("|".join(["", method, *cells, ""]))

    def _figures(self, model: PreTrainedModel) -> dict[str, float]:
        found = self._unseen.perplexities(model)
        if self._tasks is not None:
            for score in evaluate_tasks(
                model, self._tokenizer, TASKS, directory=self._tasks, limit=ITEMS, progress=False
            ):
                found |= {f"{score.task}_{name}": round(value, 4) for name, value in score.figures.items()}
        return found


def protocol(search_text: str, unseen_text: str, dtype: Any) -> str:
    """Describe how the figures were made."""
    return (
        f"SmolLM2-135M-Instruct, {dtype}; {CALIBRATION} calibration tokens of {Path(search_text).name} "
        f"for all (the first {GRADIENT_WINDOWS} windows of {WINDOW} for Taylor, block influence "
        f"and our Fisher information), another {FITNESS} "
        f"for our seeds and for a search of {SETTINGS.evaluations} full-evaluation equivalents; uniform: FFN rates; "
        "repaired: the first repair; twice: the second too, of the output projections alone or, by default, of gate "
        "and up too, and the plan is chosen for it where nothing else is said; perplexity on the first windows of "
        f"{Path(unseen_text).name}, on which nothing was chosen: {Unseen.WORDS}; tasks: the first {ITEMS} items"
    )


def add_peers(
    table: Table, pruner: AutoPruner, statistics: list[LayerStatistics], few: Tensor, betas: list[float]
) -> None:
    """Measure the other methods, calibrated on the same text."""
    model = pruner.model
    known = Flap(model, statistics)
    orders: dict[str, list[LayerOrder]] = {
        "uniform magnitude": by_channels(model, magnitude(model)),
        "uniform first-order Taylor (LLM-Pruner)": by_channels(model, taylor(model, few)),
        "uniform Wanda-sp": rank(model, statistics, "wanda-sp"),
    }
    influence = block_influence(model, few)
    for beta in betas:
        budget = ParameterBudget(pruner.shape, beta)
        plan = budget.project(seeds(budget)["uniform"])

        def add(method: str, layers: nn.ModuleList, beta: float = beta) -> None:
            with with_layers(model, layers):
                table.add(method, beta, lambda: (removed(pruner, layers), model))

        for method, order in orders.items():
            with ordered(model, order):
                add(method, Slicer(model, order, None).layers(plan))
        with ordered(model, known.order):
            add("FLAP with bias", known.layers(model, known.plan(beta)))
        add("whole layers by block influence (ShortGPT)", without_blocks(model, influence, beta))


def orders(model: PreTrainedModel, statistics: list[LayerStatistics], few: Tensor) -> dict[str, list[LayerOrder]]:
    """Orders to compare with that of OBS with Fisher information; first-order scores order channels only."""
    found = {name: rank(model, statistics, name) for name in ("wanda-sp", "flap", "energy")}
    found["obs, all errors alike"] = rank(model, statistics, "obs")
    first = by_channels(model, taylor(model, few))
    ranks = [
        -(one.channels.argsort() + two.channels.argsort()) for one, two in zip(first, found["wanda-sp"], strict=True)
    ]
    return found | {"first-order Taylor": first, "mean rank of Taylor and wanda-sp": by_channels(model, ranks)}


def add_orders(table: Table, ours: Ours, others: dict[str, list[LayerOrder]]) -> None:
    """Measure the orders after the first repair: of channels at uniform rates, of KV groups in the best seed plan."""
    for name, order in others.items():
        table.add(
            f"uniform, repaired, channels by {name}",
            ABLATED,
            lambda order=order: ours.under(order, ABLATED, "uniform"),
        )
        if "Taylor" in name:
            continue
        groups = [LayerOrder(theirs.groups, own.channels) for theirs, own in zip(order, ours.order, strict=True)]
        table.add(
            f"best seed, repaired, KV groups by {name}",
            ABLATED,
            lambda groups=groups: ours.under(groups, ABLATED, "seed"),
        )


def main(work: Path, search_text: str, unseen_text: str, betas: list[float], tasks: Path | None) -> None:
    """Measure every method at every β, and write the table."""
    pruner = load_embedded()
    table = Table(work, pruner, unseen_text, tasks, protocol(search_text, unseen_text, pruner.model.dtype))
    table.add("dense", 0.0, lambda: (0.0, pruner.model))
    windows = texts(pruner, search_text)
    few, statistics = windows[0][:GRADIENT_WINDOWS], calibrate(pruner.model, windows[0])
    add_peers(table, pruner, statistics, few, betas)
    ours = Ours.of(pruner, statistics, windows, work)
    for beta in betas:
        table.add("uniform, repaired", beta, lambda beta=beta: ours.once(beta, "uniform"))
        table.add("best seed, repaired", beta, lambda beta=beta: ours.once(beta, "seed"))
        if beta == ABLATED:
            add_orders(table, ours, orders(pruner.model, statistics, few))
            table.add("searched for the first repair, repaired", beta, lambda: ours.once(ABLATED, "kl"))
            variants = {
                "searched for the first repair, repaired twice": {"remains": 1.0},
                "searched, outputs repaired twice": {"inputs": False},
                "searched, repaired twice, all errors alike": {"alike": True},
            }
            for name, other in variants.items():
                table.add(name, beta, lambda other=other: ours.twice(ABLATED, "kl", **other))
            table.add("searched by perplexity, repaired twice", beta, lambda: ours.twice(ABLATED, "perplexity"))
        table.add("best seed, repaired twice", beta, lambda beta=beta: ours.twice(beta, "seed"))
        table.add("searched, repaired twice", beta, lambda beta=beta: ours.twice(beta, "kl"))
        table.add("searched, repaired twice, as sure as the dense model", beta, lambda beta=beta: ours.sure(beta))
    table.show()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        sys.argv[2],
        sys.argv[3],
        [float(beta) for beta in sys.argv[4].split(",")],
        Path(sys.argv[5]) if len(sys.argv) > 5 else None,
    )
