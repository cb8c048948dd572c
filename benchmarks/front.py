"""Quality against minutes: our presets, our recovery, and other training-free methods, on one model and one text.

Run: python benchmarks/front.py WORK SEARCH_TEXT UNSEEN_TEXT TASKS_DIR [NAME …]
(here: WikiText-2 raw, articles a beside the model's own conversations, articles b and the task items for the figures)
A NAME is a key of `OURS`; without any, all are run. Rows that exist in WORK are reused. Where the package optipfair is
installed, its row is made too. A model of ours that is in WORK with the JSON of its minutes is only measured.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

from defaults import DATA, begun, pruned
from peers import Flap, block_influence, by_channels, taylor, without_blocks
from picture import IMAGES
from protocol import Rows, write
from slicegpt import components, sliced
from torch import Tensor, nn
from transformers import PreTrainedModel

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.calibration.texts import Texts
from selfpruner_hub.evaluation.tasks import evaluate_tasks
from selfpruner_hub.models.architectures import decoder_layers
from selfpruner_hub.models.patching import with_layers
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning.importance import LayerOrder, rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.slicing import Slicer
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

BETA = 0.3
OURS = {
    **{preset: ("--preset", preset) for preset in ("draft", "default", "best")},
    **{f"{minutes} minutes": ("--minutes", str(minutes)) for minutes in (3, 10, 30, 60)},
}
"""Options of each of our rows: a preset only cuts, minutes are those of cut and recovery."""
OURS_IN_ROWS = "ours, "
"""Begins the name of each of our rows."""
TOKENS, GRADIENT_WINDOWS = 32_768, 16
"""Number of calibration tokens of the other methods, and of windows for those that take gradients or few passes."""
TASKS, ITEMS = ("arc_easy", "piqa", "winogrande"), 100
Measure = Callable[[PreTrainedModel], dict[str, float]]


class Peers:
    """The other methods; each does all its work in one call, so that it can be timed.

    Args:
        pruner: Pruner of the dense model.
        windows: Token ids of the calibration text, `[N, W]`.
        beta: Share of the prunable weights to remove.
    """

    def __init__(self, pruner: AutoPruner, windows: Tensor, beta: float) -> None:
        self._pruner, self._model, self._windows, self._beta = pruner, pruner.model, windows, beta
        self._few = windows[:GRADIENT_WINDOWS]
        budget = Budget(pruner.shape, beta)
        self._uniform = budget.project(seeds(budget)["uniform"])
        self.methods: dict[str, Callable[[], AbstractContextManager[nn.ModuleList]]] = {
            "Wanda-sp, uniform rates": lambda: self._by(rank(self._model, self._calibrated(), "wanda-sp")),
            "FLAP with bias": self._flap,
            "first-order Taylor (LLM-Pruner), uniform rates": lambda: self._by(
                by_channels(self._model, taylor(self._model, self._few))
            ),
            "whole layers by block influence (ShortGPT)": lambda: nullcontext(
                without_blocks(self._model, block_influence(self._model, self._few), beta)
            ),
            "SliceGPT": lambda: nullcontext(sliced(self._model, self._windows, components(self._model, beta))),
        }
        if importlib.util.find_spec("optipfair"):
            self.methods["optipfair 0.4, its data-driven MAW"] = self._optipfair

    def _calibrated(self) -> list[Any]:
        return calibrate(self._model, self._windows)

    @contextmanager
    def _by(self, order: list[LayerOrder]) -> Iterator[nn.ModuleList]:
        with ordered(self._model, order):
            yield Slicer(self._model).layers(self._uniform)

    @contextmanager
    def _flap(self) -> Iterator[nn.ModuleList]:
        known = Flap(self._model, self._calibrated())
        with ordered(self._model, known.order):
            yield known.layers(self._model, known.plan(self._beta))

    @contextmanager
    def _optipfair(self) -> Iterator[nn.ModuleList]:
        from optipfair import prune_model

        shape = self._pruner.shape
        channels = sum(w.intermediate_size for w in shape.dense.layers)
        percent = 100 * self._beta * shape.weights(shape.dense) / (channels * shape.unit_weights)
        batches = [{"input_ids": each, "attention_mask": each.new_ones(each.shape)} for each in self._few.split(4)]
        made = prune_model(
            copy.deepcopy(self._model), pruning_percentage=percent, dataloader=batches, show_progress=False
        )
        yield decoder_layers(made)


def removed(pruner: AutoPruner, layers: nn.ModuleList) -> float:
    """Share of the prunable weights that was removed, counted from the layers' tensors."""
    kept = sum(p.numel() for layer in layers for p in layer.parameters() if p.dim() > 1)
    return 1 - kept / pruner.shape.weights(pruner.shape.dense)


def add_peers(rows: Rows, pruner: AutoPruner, windows: Tensor, beta: float, measure: Measure) -> None:
    """Prune by each of the other methods, and measure."""
    for method, make in Peers(pruner, windows, beta).methods.items():
        if rows.have(method=method):
            continue
        started = time.perf_counter()
        with make() as layers:
            minutes = round((time.perf_counter() - started) / 60, 2)
            with with_layers(pruner.model, layers) as model:
                found = {"minutes": minutes, "removed": round(removed(pruner, layers), 4)}
                rows.keep({"method": method, **found, **measure(model)})


def draw(rows: Sequence[dict[str, Any]]) -> None:
    """Draw perplexity, agreement and KL on conversations against minutes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    panels = {"perplexity_spread": "perplexity, articles b", "kl_chat": "KL on conversations", "agreement": "agreement"}
    dense = next(row for row in rows if row["method"] == "dense")
    inorder = sorted((row for row in rows if row is not dense), key=lambda row: row["minutes"])
    own = [row for row in inorder if row["method"].startswith(OURS_IN_ROWS)]
    cuts = [row for row in own if OURS[row["method"].removeprefix(OURS_IN_ROWS)][0] == "--preset"]
    kinds = {"cut": cuts, "cut and recovered": [row for row in own if row not in cuts]}
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for (kind, made), line in zip(kinds.items(), ("o-", "o--"), strict=True):
            words = ", ".join(row["method"].removeprefix(OURS_IN_ROWS) for row in made)
            minutes, figures = ([row[key] for row in made] for key in ("minutes", name))
            axes.plot(minutes, figures, line, color="black", markerfacecolor="white", label=f"{kind}: {words}")
        for row in inorder:
            if row not in own:
                axes.plot(max(row["minutes"], 0.05), row[name], "s", label=row["method"])
        axes.axhline(dense[name], color="0.6", linestyle=":")
        axes.set(xscale="log", xlabel="minutes on two cores", ylabel=label)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        if name == "perplexity_spread":
            axes.set(yscale="log", yticks=[25, 50, 100, 200])
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"SmolLM2-135M-Instruct at β = {BETA:g}; dotted: dense")
    figure.savefig(IMAGES / "front.png", dpi=110)


def main(work: Path, search_text: str, unseen_text: str, tasks: Path, ours: Sequence[str] = tuple(OURS)) -> None:
    """Make every row, write the JSON and the picture."""
    rows, pruner, dense, measured, how, _ = begun(work, unseen_text)
    protocol = (
        f"SmolLM2-135M-Instruct in bfloat16 at β = {BETA:g}. Ours: `selfpruner prune` with each preset, which only "
        "cuts, and with `--minutes N`, which also recovers; minutes of the whole command. The others: the first "
        f"{TOKENS} tokens (Taylor, block influence, optipfair: {GRADIENT_WINDOWS} windows) of the calibration text of "
        f"the default, {DATA}{Path(search_text).name}; minutes without the writing of that text. SliceGPT keeps as "
        "many components as leave the same weights, those of its shortcuts included. Rows may be of several runs on "
        f"this machine; {how}; mean accuracy, with its standard error, on the first {ITEMS} items of each of "
        f"{', '.join(TASKS)}"
    )

    def measure(model: PreTrainedModel) -> dict[str, float]:
        scores = evaluate_tasks(model, pruner.tokenizer, TASKS, directory=tasks, limit=ITEMS, progress=False)
        error = math.hypot(*(each.errors["acc"] for each in scores)) / len(scores)
        accuracy = {"accuracy": mean(each.figures["acc"] for each in scores), "accuracy_error": error}
        rounded = {name: round(value, 4) for name, value in accuracy.items()}
        return {**measured(model), **rounded}

    if not rows.have(method="dense"):
        rows.keep({"method": "dense", "minutes": 0.0, "removed": 0.0, **measure(pruner.model)})
    settings = resolve("default", evaluations=0)
    text = Texts(pruner.model, pruner.tokenizer).read(
        DATA + search_text, settings, Run(checkpoints=Checkpoints(work / "text"))
    )
    add_peers(rows, pruner, text.calibration.windows[: TOKENS // settings.window], BETA, measure)
    for name in ours:
        if not rows.have(method=OURS_IN_ROWS + name):
            output = work / name.replace(" ", "-")
            found = pruned(dense, BETA, DATA + search_text, output, measure, OURS[name])
            rows.keep({"method": OURS_IN_ROWS + name, "removed": found["achieved_beta"], **found})
    write("front", protocol, sorted(rows, key=lambda row: float(row["minutes"])))
    draw(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]), sys.argv[5:] or tuple(OURS))
