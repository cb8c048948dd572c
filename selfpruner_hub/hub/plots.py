"""Plots of a run: the curve of its search, the population, the final rates, and the loss of a recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from selfpruner_hub.errors import OutputError, RunMismatchError
from selfpruner_hub.plans.plan import ModelShape
from selfpruner_hub.search.journal import JOURNAL_FILE, read_journal
from selfpruner_hub.search.journal_lines import ProbeLine, ScoreLine
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, read_record

PICTURE_FORMATS = ("png", "svg")


def plot_search(directory: Path, output: Path, formats: Sequence[str] = PICTURE_FORMATS) -> list[Path]:
    """Draw `search`, `population` and `rates` from the journal, and `recovery` from the record of a recovered model.

    Args:
        directory: Directory of a run or of a saved model, which holds `search.jsonl`.
        output: Directory of the plots; created if missing.
        formats: File formats, such as `png` and `svg`.

    Returns:
        Paths of the files that were written.

    Raises:
        RunMismatchError: There is no journal, or it holds no score on all windows.
        OutputError: The plots cannot be written.
    """
    path = directory / JOURNAL_FILE
    if not path.is_file():
        raise RunMismatchError(
            f"{str(directory)!r} holds no {JOURNAL_FILE}.", "Give a run directory, or a directory that prune wrote."
        )
    settings, lines = read_journal(path)
    scores = [line for line in lines if isinstance(line, ScoreLine)]
    if not any(score.share == 1 and math.isfinite(score.fitness) for score in scores):
        raise RunMismatchError(f"{path} holds no complete score yet.", "Let the search run on.")
    shape = ModelShape.of_record(settings["shape"])
    pictures = {
        "search": _curve([line for line in lines if isinstance(line, ScoreLine | ProbeLine)], settings),
        "population": _population(scores, shape),
        "rates": _rates(_best(scores), shape, settings),
    }
    recovery = read_record(directory).recovery if (directory / MODEL_RECORD_FILE).is_file() else None
    if recovery and recovery["curve"]:
        pictures["recovery"] = _recovery(recovery["curve"])
    written = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, figure in pictures.items():
            for kind in formats:
                FigureCanvasAgg(figure)
                figure.savefig(output / f"{name}.{kind}", dpi=150, bbox_inches="tight")
                written.append(output / f"{name}.{kind}")
    except OSError as error:
        raise OutputError(f"Cannot write {str(output)!r}: {error.strerror}.", "Choose another output.") from error
    return written


def _best(scores: Sequence[ScoreLine]) -> ScoreLine:
    full = [s for s in scores if s.share == 1 and math.isfinite(s.fitness)]
    return min(full, key=lambda s: s.fitness)


def _curve(spending: Sequence[ScoreLine | ProbeLine], settings: dict[str, Any]) -> Figure:
    """Plot the scores on all windows and the best so far against full-evaluation equivalents, probes included."""
    spent = np.cumsum([line.share for line in spending])
    scores = [(x, s) for x, s in zip(spent, spending, strict=True) if isinstance(s, ScoreLine)]
    points = [
        (x, s.fitness, s.origin.partition(":")[0]) for x, s in scores if s.share == 1 and math.isfinite(s.fitness)
    ]
    x, y, origins = zip(*points, strict=True)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    for origin in sorted(set(origins)):
        chosen = np.array([(a, b) for a, b, source in points if source == origin])
        axes.scatter(chosen[:, 0], chosen[:, 1], s=18, label=origin)
    axes.step(x, np.minimum.accumulate(y), where="post", color="black", linewidth=1, label="best so far")
    axes.set_xlabel("full-evaluation equivalents")
    axes.set_ylabel(f"{settings['fitness']} on the search text")
    axes.set_title(f"{settings['model']}, {_asked(settings)}")
    axes.legend()
    return figure


def _asked(settings: dict[str, Any]) -> str:
    """Name β, or the target in place of it."""
    if (target := settings.get("target")) is None:
        return f"β = {settings['beta']}"
    return f"{target['quantity']} = {target['value']:g} in {target['runtime']}"


def _population(scores: Sequence[ScoreLine], shape: ModelShape) -> Figure:
    """Plot the rate of every layer in every plan, in the order in which plans were first scored."""
    plans = list(dict.fromkeys(s.plan for s in scores))
    rates = np.array([shape.rates(plan) for plan in plans]).T
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    image = axes.imshow(100 * rates, aspect="auto", origin="lower", cmap="viridis", vmin=0)
    figure.colorbar(image, label="removed, %")
    axes.set_xlabel("plan, in order of scoring")
    axes.set_ylabel("layer")
    return figure


def _rates(best: ScoreLine, shape: ModelShape, settings: dict[str, Any]) -> Figure:
    """Plot the share of each layer's weights that the best plan removes, split into attention and FFN."""
    plan = best.plan
    layers = np.arange(1, shape.num_layers + 1)
    sizes = np.array([max(1, shape.layer_weights(w)) for w in shape.dense.layers])  # 0 in a layer without experts
    pairs = list(zip(shape.dense.layers, plan.layers, strict=True))
    attention = np.array([(d.num_key_value_heads - k.num_key_value_heads) * shape.group_weights for d, k in pairs])
    ffn = np.array([(d.intermediate_size - k.intermediate_size) * shape.unit_weights for d, k in pairs])
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.bar(layers, 100 * ffn / sizes, label="experts" if shape.expert_weights else "FFN")
    if not shape.expert_weights:
        axes.bar(layers, 100 * attention / sizes, bottom=100 * ffn / sizes, label="attention")
    if "target" not in settings:
        axes.axhline(100 * settings["beta"], color="black", linestyle="--", linewidth=1, label="β")
    axes.set_xlabel("layer")
    axes.set_ylabel("removed, % of the layer")
    axes.set_ylim(0, min(100, 1.15 * math.ceil(100 * max(shape.rates(plan))) + 1))
    axes.set_title(f"{settings['model']}: best plan, from {best.origin}")
    axes.legend()
    return figure


def _recovery(curve: Sequence[Sequence[float]]) -> Figure:
    """Plot the divergence from the parent on the text that is trained on, against the tokens read."""
    tokens, divergences = zip(*curve, strict=True)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot()
    axes.plot(np.array(tokens) / 1000, divergences, linewidth=1)
    axes.set_xlabel("thousand tokens trained on")
    axes.set_ylabel("KL from the parent, nats")
    axes.set_ylim(bottom=0)
    axes.set_title("Recovery")
    return figure
