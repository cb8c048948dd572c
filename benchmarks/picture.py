"""Pictures from JSON: README's, of quality against speed (uniform.json), and the curves of searches.

Run: python benchmarks/picture.py
README's is of the models that `prune` makes with its defaults, before and after recovery.
Each file holds its figures as text, and `tests/test_docs.py` compares them with the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
"""Directory of the pictures of docs/results.md."""
PICTURE = IMAGES / "quality_and_speed.png"
QUALITY = {
    "perplexity_spread": "perplexity on articles b (lower is better)",
    "kept": "plain questions kept (higher is better)",
}
"""Axis labels by key of uniform.json."""
RUNTIMES = {"llama.cpp f16": "gguf:f16:512", "ONNX Runtime float32": "onnx:float32:512"}
"""Keys of the speed-ups in uniform.json by what they are called."""
STATES = {"recovered": True, "cut": False}
"""Whether a model was to be recovered, by what the line is called."""

CURVES = {
    "equal_budget": "best perplexity so far on the search text",
    "search": "best score so far on the fitness text",
}
"""JSON files with the curves of searches, and the label of their values."""
Searches = dict[str, dict[str, list[list[list[float]]]]]
"""(Evaluations, best value so far) of every round, by β and proposer: a list for each seed."""


def points() -> dict[str, dict[str, list[list[float]]]]:
    """(β, speed-up, quality) of each model, the dense one first, by quality key and series."""
    dense, *rows = [row for row in _results("uniform") if row.get("widths") != "uniform"]
    return {
        quality: {
            f"{runtime}, {state}": [
                [0.0, 1.0, dense[quality]],
                *(
                    [row["beta"], row["speed"][key]["prefill"], row[quality]]
                    for row in rows
                    if bool(row["asked_tokens"]) == recovered
                ),
            ]
            for runtime, key in RUNTIMES.items()
            for state, recovered in STATES.items()
        }
        for quality in QUALITY
    }


def curves(name: str) -> Searches:
    """The curves of the searches in a JSON file of `CURVES`."""
    panels: Searches = {}
    for row in _results(name):
        if "curve" in row:
            panels.setdefault(f"{row['beta']:g}", {}).setdefault(row["method"], []).append(row["curve"])
    return panels


def _results(name: str) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["results"]
    return results


def draw_points(shown: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Draw a panel for each quality, with a line for each series."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(6.4 * len(shown), 4.4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (quality, series) in zip(panels, shown.items(), strict=True):
        for number, (name, rows) in enumerate(series.items()):
            _, speeds, values = zip(*rows, strict=True)
            style = {"color": f"C{number // 2}", "linestyle": "-" if number % 2 == 0 else "--"}
            panel.plot(speeds, values, marker="o", label=name, **style)
        for beta, speed, value in max(series.values(), key=lambda rows: rows[-1][1]):
            called = f"β = {beta:g}" if beta else "dense"
            panel.annotate(called, (speed, value), xytext=(8, 0), textcoords="offset points", va="center")
        panel.set(xlabel="times faster than the dense model, prompt of 512 tokens", ylabel=QUALITY[quality])
        panel.margins(x=0.2, y=0.08)
        panel.grid(alpha=0.3)
        if quality == "kept":
            panel.yaxis.set_major_formatter(PercentFormatter(1))
    _save(figure, shown, "SmolLM2-135M-Instruct on two CPU cores", path)


def draw_curves(shown: Searches, label: str, path: Path) -> None:
    """Draw a panel for each β, with a line for each search; all searches of a proposer have one colour."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(6.4 * len(shown), 4.4), layout="constrained")
    methods = sorted({method for panel in shown.values() for method in panel})
    for panel, (beta, by_method) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        for method, searches in by_method.items():
            for number, curve in enumerate(searches):
                spent, best = zip(*curve, strict=True)
                colour = f"C{methods.index(method)}"
                panel.step(spent, best, color=colour, where="post", label=None if number else method)
        panel.set(xlabel="evaluations", ylabel=label, yscale="log", title=f"β = {beta}")
        for which in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            which(StrMethodFormatter("{x:g}"))
        panel.grid(alpha=0.3, which="both")
    _save(figure, shown, "Searches on SmolLM2-135M-Instruct", path)


def _save(figure: Any, shown: Any, title: str, path: Path) -> None:
    """Add legend and title, and write the file with its figures."""
    legend = [pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    handles = {label: handle for handle, label in legend}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(shown)})


if __name__ == "__main__":
    draw_points(points(), PICTURE)
    for name, label in CURVES.items():
        draw_curves(curves(name), label, IMAGES / f"{name}.png")
    print(f"wrote {', '.join(f'{name}.png' for name in (PICTURE.stem, *CURVES))} in {IMAGES.relative_to(ROOT)}")
