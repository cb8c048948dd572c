"""Time and peak memory of every stage by depth, width, tokens and candidates, on random models.

Run: python benchmarks/scale.py [LARGEST]
LARGEST: parameters of the largest model in the series of whole models, in millions (default 150).
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from picture import IMAGES
from protocol import memory, peak_of_memory, write
from scipy.optimize import nnls
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from selfpruner_hub.calibration.statistics import calibrate
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruning.importance import rank
from selfpruner_hub.pruning.ordering import ordered
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import Slicer, slice_model

BETA, WINDOW, VOCABULARY = 0.3, 256, 8192
BASE = {"layers": 8, "width": 512, "ffn": 1024, "tokens": 4096, "candidates": 4}
SERIES: dict[str, list[dict[str, int]]] = {
    "layers": [{"layers": n} for n in (4, 8, 16, 32)],
    "ffn": [{"ffn": n} for n in (512, 1024, 2048, 4096)],
    "tokens": [{"tokens": n} for n in (2048, 4096, 8192, 16384)],
    "candidates": [{"candidates": n} for n in (2, 4, 8, 16)],
}
"""Series of sizes; each changes one size of `BASE`."""
LLAMA_2_70B = {"layers": 80, "width": 8192, "ffn": 28672, "tokens": 131_072, "candidates": 32}
"""Sizes of LLaMA-2-70B; the search has as many full evaluations as the default's, each on a quarter of the tokens."""
ATTENTION_70B = 2 * 8192 * (8192 + 1024)
WHOLE = [(256, 8), (512, 12), (768, 16), (1024, 24), (1536, 28), (2048, 28)]
"""Width and depth of whole models, 10 M to 1.5 B parameters; the FFN width is three times the width."""


def build(layers: int, width: int, ffn: int) -> PreTrainedModel:
    """Build a random Llama in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 128,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@contextmanager
def measured(stage: str, into: dict[str, Any]) -> Iterator[None]:
    """Record the seconds of a stage, and by how much its peak of resident memory exceeds that at its start, in MB."""
    with peak_of_memory() as peak:
        before, started = memory(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        into[stage] = {"seconds": round(seconds, 3), "megabytes": round(peak() - before, 1)}


def run(layers: int, width: int, ffn: int, tokens: int, candidates: int) -> dict[str, Any]:
    """Prune one model stage by stage, and measure each stage."""
    model, found = build(layers, width, ffn), dict[str, Any]()
    windows = torch.randint(3, VOCABULARY, (tokens // WINDOW, WINDOW), generator=torch.Generator().manual_seed(0))
    budget = ParameterBudget(shape_of(model.config), BETA)
    plan = budget.project(seeds(budget)["uniform"])
    with measured("calibrating", found):
        statistics = calibrate(model, windows)
    with measured("ordering", found):
        order = rank(model, statistics, "obs")
    with ordered(model, order):
        with measured("factoring", found):
            slicer = Slicer(model, order, statistics)
        del statistics
        fitness = Fitness(slicer, windows[: max(1, len(windows) // 4)])
        with measured("scoring", found):
            for number in range(candidates):
                fitness(_varied(budget, number))
        with measured("slicing", found):
            pruned = slice_model(slicer, plan)
    del slicer, fitness
    with measured("repairing", found):
        compensate(model, pruned, windows)
    with tempfile.TemporaryDirectory() as directory, measured("saving", found):
        pruned.save_pretrained(directory, max_shard_size="1GB")
    return {"parameters": sum(p.numel() for p in model.parameters()), "stages": found}


def _varied(budget: ParameterBudget, number: int) -> Any:
    """Make a different plan for each number, so that each needs new repairs."""
    starts = seeds(budget)
    rates = starts["ramp"] if number % 2 else starts["uniform"]
    shifted = tuple(max(0.0, rate + 0.02 * math.sin(number + index)) for index, rate in enumerate(rates.ffn))
    return budget.project(type(rates)(rates.attention, shifted))


def growth(rows: list[dict[str, Any]], what: str, figure: str) -> dict[str, float]:
    """Growth exponent of each stage: the least-squares slope of log(figure) against log(what)."""
    found = {}
    for stage in rows[0]["stages"]:
        points = [(math.log(r[what]), math.log(max(r["stages"][stage][figure], 1e-3))) for r in rows]
        x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
        found[stage] = round(sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points), 2)
    return found


Sizes = dict[str, int]


def seconds(stage: str, sizes: Sizes, attention: int) -> list[float]:
    """Terms of a stage's time: forward passes, products of the statistics, solves, and a constant for each layer."""
    layers, width, ffn, tokens = (sizes[name] for name in ("layers", "width", "ffn", "tokens"))
    models = sizes["candidates"] if stage == "scoring" else 1
    read = tokens / 4 if stage == "scoring" else tokens
    weights, cubes = attention + 3 * width * ffn, ffn**2 * (ffn + width)
    return [models * layers * each for each in (weights * read, ffn**2 * read, cubes, 1)]


def megabytes(_stage: str, sizes: Sizes, attention: int) -> list[float]:
    """Terms of a stage's memory: statistics of all layers and of one, weights, hidden states, and a constant."""
    layers, width, ffn, tokens = (sizes[name] for name in ("layers", "width", "ffn", "tokens"))
    return [layers * ffn**2, ffn**2, layers * (attention + 3 * width * ffn), tokens * width, 1]


def estimate(rows: list[dict[str, Any]], figure: str) -> dict[str, dict[str, float]]:
    """Fit the terms of each stage to all rows, by non-negative least squares of relative errors.

    Returns:
        For each stage, the fit's prediction for LLaMA-2-70B, and the median relative error of the fit.
    """
    found = {}
    parts = {"seconds": seconds, "megabytes": megabytes}[figure]
    for stage in rows[0]["stages"]:
        known = [row for row in rows if row["stages"][stage][figure] > 0]
        values = np.array([row["stages"][stage][figure] for row in known])
        matrix = np.array([parts(stage, row, 3 * row["width"] ** 2) for row in known])  # as `build` has it
        scale = matrix.max(0)
        shares, _ = nnls(matrix / scale / values[:, None], np.ones(len(known)))
        errors = np.abs(matrix / scale @ shares / values - 1)
        large = np.array(parts(stage, LLAMA_2_70B, ATTENTION_70B)) / scale @ shares
        found[stage] = {"70b": round(float(large), 1), "error": round(float(np.median(errors)), 3)}
    return found


def draw(table: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot seconds (upper row) and megabytes (lower row), with a column for each series and logarithmic axes."""
    figure = Figure(figsize=(3.2 * len(table), 6.4), layout="constrained")
    axes = figure.subplots(2, len(table), sharey="row")
    for column, (what, rows) in enumerate(table.items()):
        for row, unit in enumerate(("seconds", "megabytes")):
            panel = axes[row][column]
            for stage in rows[0]["stages"]:
                panel.plot([r[what] for r in rows], [r["stages"][stage][unit] for r in rows], "o-", label=stage)
            panel.set(yscale="log", xlabel=what, ylabel=unit if not column else None)
            panel.set_xscale("log", base=10 if what == "parameters" else 2)
            panel.grid(alpha=0.3)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def series(largest: float) -> Iterator[tuple[str, dict[str, int]]]:
    """Yield the sizes to measure: first one size changed at a time, then whole models."""
    for what, changes in SERIES.items():
        for change in changes:
            yield what, {**BASE, **change}
    for width, layers in WHOLE:
        if layers * width * width * 12 <= largest * 1e6:
            yield "parameters", {**BASE, "layers": layers, "width": width, "ffn": 3 * width, "candidates": 2}


def warm(sizes: dict[str, int]) -> dict[str, Any]:
    """Prune a small model first, to load the libraries, then measure the pruning of a model."""
    run(**{**BASE, "layers": 2, "tokens": 1024})
    return {**sizes, **run(**sizes)}


def main(largest: float) -> None:
    """Measure all sizes, fit the terms, and draw."""
    table: dict[str, list[dict[str, Any]]] = {}
    for what, sizes in series(largest):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            table.setdefault(what, []).append(fresh.submit(warm, sizes).result())
        print(what, table[what][-1], flush=True)
    exponents = {
        what: {figure: growth(rows, what, figure) for figure in ("seconds", "megabytes")}
        for what, rows in table.items()
        if len(rows) > 1
    }
    draw(table, IMAGES / "scale.png")
    write(
        "scale",
        f"random Llamas in bfloat16, windows of {WINDOW}, β = {BETA}, vocabulary {VOCABULARY}; base {BASE}; each "
        "series changes one thing; parameters: whole models, FFN three times the width; a process for each, which "
        "has pruned a small one; seconds, and peak of resident memory above that before the stage; scoring: all "
        "candidates, on a quarter of the tokens; exponents: slopes of the logarithms; llama_2_70b: the parts of each "
        "stage fitted to all rows, at the size of LLaMA-2-70B, on this machine with everything in memory",
        {
            "series": table,
            "exponents": exponents,
            "llama_2_70b": {
                figure: estimate([row for rows in table.values() for row in rows], figure)
                for figure in ("seconds", "megabytes")
            },
        },
    )


if __name__ == "__main__":
    main(float((sys.argv[1:] or ["150"])[0]))
