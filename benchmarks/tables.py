"""Fill the generated tables of the pages: figures from JSON, settings and the tree of modules from docstrings.

Run: python benchmarks/tables.py
It imports no torch. `tests/test_docs.py` holds the pages equal to what is made here.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import log2
from pathlib import Path
from statistics import linear_regression
from typing import Any

from columns import (
    COLUMNS,
    DENSE_OR_BETA,
    PERPLEXITIES,
    QUALITY,
    RECOVERED,
    RUNTIME_NAMES,
    UNKNOWN,
    Row,
    figure,
    markdown,
    measured,
    of_benchmark,
    share,
    shown,
)

from selfpruner_hub.recovery.settings import RecoverySettings
from selfpruner_hub.settings import PRESETS, EndpointOptions, described_fields, explained

ROOT = Path(__file__).parents[1]
DEFAULTS = ROOT / "benchmarks" / "defaults.json"
CARD_RECORD = ROOT / "model_cards" / "smollm2-135m-instruct-b30" / "selfpruner.json"
SERVING = ROOT / "benchmarks" / "serving.json"
MEMORY = ROOT / "benchmarks" / "memory.json"
UNIFORM = ROOT / "benchmarks" / "uniform.json"
RECOVERY = ROOT / "benchmarks" / "recovery.json"
GROWING = {"perplexity_spread": "perplexity", "kl_chat": "KL on conversations", "kl_code": "KL on code"}
"""Figures whose growth with the tokens is fitted, by their key in recovery.json."""


def defaults_table() -> str:
    """What is left of the model at each β, as a Markdown table, what that means for chat, and where it was measured."""
    rows = _defaults()
    notes = "".join(f" {row['note']}" for row in rows if "note" in row)
    return f"{_figures_table(rows)}\n\n{_kept(rows)}{notes}\n\n{measured(DEFAULTS)}"


def _figures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = (
        ("β", lambda row: f"{row['beta']:g}" if row["beta"] else "dense"),
        ("parameters", lambda row: f"{_parameters(row) / 1e6:.1f} M"),
        *PERPLEXITIES,
        ("agreement", lambda row: share(row, "agreement")),
        ("questions kept", lambda row: share(row, "kept")),
        ("KL, code", lambda row: figure(row, "kl_code", "{:.2f}")),
        ("minutes", lambda row: figure(row, "minutes", "{:.0f}")),
    )
    return shown(rows, columns, numbers=True)


def _defaults() -> list[dict[str, Any]]:
    return _rows(DEFAULTS)


def _rows(file: Path) -> list[dict[str, Any]]:
    rows = json.loads(file.read_text(encoding="utf-8"))["results"]
    return sorted(rows, key=lambda row: row["beta"])


def _kept(rows: Sequence[Mapping[str, Any]]) -> str:
    shares = [f"{share(row, 'kept')} at β = {row['beta']:g}" for row in rows if row["beta"] and "kept" in row]
    if not shares:
        return "Agreement, plain questions and code have not been measured for these models yet."
    listed = " and ".join(filter(None, (", ".join(shares[:-1]), shares[-1])))
    return f"Of the plain questions that the dense model answers rightly, the pruned one still answers {listed}."


def _parameters(row: Mapping[str, Any]) -> float:
    """Of the row; where it has none, from β and the counts in the record of the published card."""
    if "parameters" in row:
        return float(row["parameters"])
    record = json.loads(CARD_RECORD.read_text(encoding="utf-8"))
    dense, pruned = record["parameters"]["dense"], record["parameters"]["pruned"]
    prunable = (dense - pruned) / record["achieved_beta"]
    return float(dense - row.get("achieved_beta", row["beta"]) * prunable)


def serving_table() -> str:
    """Speed and memory in every runtime, and where they were measured."""
    return f"{speeds(json.loads(SERVING.read_text(encoding='utf-8'))['results'])}\n\n{measured(SERVING)}"


def memory_table() -> str:
    """Memory and minutes of models from 1 to 70 billion weights, which are counted, not measured."""
    return shown(json.loads(MEMORY.read_text(encoding="utf-8"))["results"], COLUMNS["memory"], numbers=True)


def recovery_table() -> str:
    """The default cut before and after recovery."""
    return f"{shown(_own_widths(), (DENSE_OR_BETA, *RECOVERED))}\n\n{measured(UNIFORM)}"


def growth_table() -> str:
    """One cut after recoveries of more and more tokens, and what a doubling brings."""
    of_one = [row for row in _rows(RECOVERY) if row.get("asked") is None]
    rows = sorted(of_one, key=lambda row: (row["beta"], row.get("tokens", 0)))
    trained = [row for row in rows if row.get("tokens")]
    doubled = {
        name: 2 ** linear_regression(*zip(*((log2(row["tokens"]), log2(row[key])) for row in trained), strict=True))[0]
        for key, name in GROWING.items()
    }
    listed = ", ".join(f"{100 * (1 - factor):.1f} % off the {name}" for name, factor in doubled.items())
    fit = f"A doubling of the tokens takes {listed} (least squares of the logarithms over these rows)."
    return f"{shown(rows, COLUMNS['recovery'])}\n\n{fit}\n\n{measured(RECOVERY)}"


def minutes_table() -> str:
    """Models that were cut and recovered in minutes that were asked for, beside the dense one."""
    rows = [row for row in _rows(RECOVERY) if row.get("asked") or not row["beta"]]
    return f"{shown(rows, COLUMNS['recovery'])}\n\n{measured(RECOVERY)}"


def readme_table() -> str:
    """The default cut at each β, and behind an arrow the recovered model, where the recovery was not refused."""
    rows = _own_widths()
    recovered = {row["beta"]: row for row in rows if row.get("tokens")}

    def both(cell: Callable[[Row], str]) -> Callable[[Row], str]:
        return lambda row: " → ".join(cell(each) for each in (row, recovered.get(row["beta"])) if each)

    columns = [(name, both(cell)) for name, cell in QUALITY]
    size = ("parameters", lambda row: f"{_parameters(row) / 1e6:.1f} M")
    table = shown([row for row in rows if not row.get("asked_tokens")], (DENSE_OR_BETA, size, *columns), numbers=True)
    return f"{table}\n\n{measured(UNIFORM)}"


def _own_widths() -> list[dict[str, Any]]:
    return [row for row in _rows(UNIFORM) if row.get("widths") != "uniform"]


def speeds(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed-ups, each with its ideal in brackets, peak memory, and perplexity where it was measured, as a table."""
    prompts, read = sorted({row["prompt"] for row in rows}), any("perplexity" in row for row in rows)
    names = [f"{what} {prompt}" for prompt in prompts for what in ("prompt of", "a token after")]
    cells = []
    for kind in dict.fromkeys((row["runtime"], row["dtype"], row["model"]) for row in rows):
        own = {row["prompt"]: row for row in rows if (row["runtime"], row["dtype"], row["model"]) == kind}
        last = max(own.values(), key=lambda row: row["peak_mb"])
        changes = [
            f"{own[prompt][f'{phase}_speedup']:.2f} ({own[prompt][f'{phase}_ideal']:.2f})" if prompt in own else UNKNOWN
            for prompt in prompts
            for phase in ("prefill", "decode")
        ]
        cells.append([f"{RUNTIME_NAMES[kind[0]]}, {kind[1]}", f"{last['beta']:g}", *changes])
        cells[-1].append(f"{last['dense_peak_mb']:.0f} → {last['peak_mb']:.0f}")
        if read:
            both = [figure(last, name, "{:.1f}") for name in ("dense_perplexity", "perplexity")]
            cells[-1].append(UNKNOWN if UNKNOWN in both else " → ".join(both))
    measures = ["memory in MB", *(["perplexity"] if read else [])]
    return markdown(["runtime", "β", *names, *(f"{name}, dense → pruned" for name in measures)], cells)


def settings_table(schedule: bool = False) -> str:
    """Every setting: its name, its default, those of the other presets where they differ, and its meaning.

    Those of the schedule of the search are in a table of their own.
    """
    others = [preset for preset in PRESETS if preset != "default"]
    rows = [
        [
            f"`{default.name}`",
            f"`{json.dumps(default.default)}`",
            *("" if other.default == default.default else f"`{json.dumps(other.default)}`" for other in rest),
            default.meaning.replace("|", "\\|"),
        ]
        for default, *rest in zip(explained(), *map(explained, others), strict=True)
        if default.name.startswith("schedule.") == schedule
    ]
    return markdown(["setting", "default", *others, "meaning"], rows)


def described_table(cls: type, column: str = "setting") -> str:
    """Every field of a dataclass of settings: its name, its default and its meaning."""
    rows = [
        [f"`{each.name}`", f"`{json.dumps(each.default)}`", each.meaning.replace("|", "\\|")]
        for each in described_fields(cls)
    ]
    return markdown([column, "default", "meaning"], rows)


def tree() -> str:
    """Every package and module, with the first sentence of its docstring."""
    lines = [line for package in ("selfpruner_hub", "exporters") for line in _branch(ROOT / package)]
    return "\n".join(("```", *lines, "```"))


def _branch(folder: Path, depth: int = 0) -> Iterator[str]:
    yield _leaf(f"{folder.name}/", folder / "__init__.py", depth)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.suffix == ".py" and path.name != "__init__.py":
            yield _leaf(path.name, path, depth + 1)
        elif (path / "__init__.py").is_file():
            yield from _branch(path, depth + 1)


def _leaf(name: str, module: Path, depth: int) -> str:
    text = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or ""
    first = re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]
    return f"{'  ' * depth + name:<28}{' '.join(first.split())}".rstrip()


GENERATED = (
    ("docs/architecture.md", "tree", tree),
    ("README.md", "recovery", readme_table),
    ("docs/results.md", "defaults", defaults_table),
    ("docs/data.md", "shares", partial(of_benchmark, "shares")),
    ("docs/results.md", "front", partial(of_benchmark, "front")),
    ("docs/results.md", "serving", serving_table),
    ("docs/results.md", "searches", partial(of_benchmark, "search")),
    ("docs/results.md", "equal_budget", partial(of_benchmark, "equal_budget")),
    ("docs/results.md", "targets", partial(of_benchmark, "targets")),
    ("docs/settings.md", "settings", settings_table),
    ("docs/settings.md", "schedule", partial(settings_table, schedule=True)),
    ("docs/proposers.md", "options", partial(described_table, EndpointOptions, "option")),
    ("docs/recovery.md", "recovery", recovery_table),
    ("docs/recovery.md", "growth", growth_table),
    ("docs/recovery.md", "minutes", minutes_table),
    ("docs/large_models.md", "memory", memory_table),
    ("docs/results.md", "uniform", partial(of_benchmark, "uniform")),
    ("docs/recovery.md", "recovery_settings", partial(described_table, RecoverySettings)),
)
"""Pages, the name of the markers in them, and what makes the text between these."""


def filled(page: str, marker: str, text: str) -> str:
    """Put a text between the two markers of a page."""
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"the page needs {start} and {end}, once each")
    return re.sub(f"{start}.*{end}", lambda _: f"{start}\n{text}\n{end}", page, flags=re.DOTALL)


def main() -> None:
    """Fill all tables."""
    for name, marker, make in GENERATED:
        page = ROOT / name
        page.write_text(filled(page.read_text(encoding="utf-8"), marker, make()), encoding="utf-8")
        print(f"filled {name}")


if __name__ == "__main__":
    main()
