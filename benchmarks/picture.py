"""README's picture: quality against speed of the dense and pruned models, from defaults.json and serving.json.

Run: python benchmarks/picture.py
Both are of the models that `prune` makes with its defaults.
The file holds its figures as text, and `tests/test_docs.py` compares them with the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "quality_and_speed.png"
QUALITY = {
    "perplexity_512": "perplexity on articles b (lower is better)",
    "kept": "plain questions kept (higher is better)",
}
"""Axis labels by key of defaults.json; a key that is missing in the rows is left out."""
SERIES = {
    "ONNX Runtime float32, prompt of 512": ("onnx", "float32", "prefill_speedup", 512),
    "ONNX Runtime float32, a token after 128": ("onnx", "float32", "decode_speedup", 128),
    "llama.cpp f16, prompt of 512": ("gguf", "f16", "prefill_speedup", 512),
    "llama.cpp f16, a token after 128": ("gguf", "f16", "decode_speedup", 128),
}
"""Runtime, dtype, key of serving.json and prompt length, in tokens, of each series."""


def points() -> dict[str, dict[str, list[list[float]]]]:
    """(β, speed-up, quality) of each model, the dense one first, by quality key and series."""
    defaults, serving = (_results(name) for name in ("defaults", "serving"))
    found: dict[str, dict[str, list[list[float]]]] = {}
    for quality in QUALITY:
        known = {row["beta"]: row[quality] for row in defaults if row.get(quality) is not None}
        known |= {0.0: 1.0} if quality == "kept" and known else {}
        if len(known) < 2 or 0.0 not in known:
            continue
        for series, (runtime, dtype, speed, prompt) in SERIES.items():
            fast = {
                row["beta"]: row[speed]
                for row in serving
                if (row["runtime"], row["dtype"], row["prompt"]) == (runtime, dtype, prompt)
            }
            both = sorted(known.keys() & fast.keys())
            rows = [[beta, fast[beta], known[beta]] for beta in both]
            found.setdefault(quality, {})[series] = [[0.0, 1.0, known[0.0]], *rows]
    return found


def _results(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())["results"]
    return found


def draw(shown: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
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
        panel.set(xlabel="times faster than the dense model", ylabel=QUALITY[quality])
        panel.margins(x=0.2, y=0.08)
        panel.grid(alpha=0.3)
        if quality == "kept":
            panel.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    figure.suptitle("SmolLM2-135M-Instruct on two CPU cores")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Description": json.dumps(shown)})


if __name__ == "__main__":
    draw(points(), PICTURE)
    print(f"wrote {PICTURE.relative_to(ROOT)}")
