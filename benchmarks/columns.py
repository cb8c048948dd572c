"""Tables of what benchmarks wrote: the columns of each, and how a row fills them. It imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporters.format import FORMATS, runtimes

Row = Mapping[str, Any]
Columns = Sequence[tuple[str, Callable[[Row], str]]]
"""Names of columns, and what a row has in them."""
UNKNOWN = "–"
"""Stands where a row has no such figure."""
RUNTIME_NAMES = {name: FORMATS[name].title for name in runtimes()}


def figure(row: Row, key: str, form: str) -> str:
    """A number of a row, in a form."""
    return form.format(row[key]) if row.get(key) is not None else UNKNOWN


def share(row: Row, key: str) -> str:
    """A share of a row, in percent."""
    return f"{100 * row[key]:.0f} %" if row.get(key) is not None else UNKNOWN


def difference(row: Row) -> str:
    """A paired difference with its standard error."""
    return f"{row['difference']:+.4f} ± {row['standard_error']:.4f}" if "difference" in row else UNKNOWN


def speedups(row: Row, run: str) -> str:
    """Speed-ups of prefill and decode in a runtime, of a row that has several."""
    times = row["speed"].get(run)
    return UNKNOWN if times is None else f"{times['prefill']:.2f}, {times['decode']:.2f}"


def words(key: str) -> Callable[[Row], str]:
    """Words or a whole number of a row, as they are."""
    return lambda row: str(row.get(key, UNKNOWN)).replace("|", "")


def trained(row: Row) -> str:
    """Tokens that a model was trained on; a recovery that was asked for and brought nothing was refused."""
    asked = row.get("asked_tokens") or row.get("asked")
    return f"{row['tokens']:,}" if row.get("tokens") else "refused" if asked else UNKNOWN


BETA = ("β", lambda row: f"{row['beta']:g}")
DENSE_OR_BETA = ("β", lambda row: f"{row['beta']:g}" if row["beta"] else "dense")
PERPLEXITIES: Columns = (
    ("perplexity, 512", lambda row: figure(row, "perplexity_512", "{:.1f}")),
    ("perplexity, 2048", lambda row: figure(row, "perplexity_2048", "{:.1f}")),
    ("perplexity, spread", lambda row: figure(row, "perplexity_spread", "{:.1f}")),
)
CHAT: Columns = (
    ("KL, chat", lambda row: figure(row, "kl_chat", "{:.2f}")),
    ("agreement", lambda row: share(row, "agreement")),
    ("questions kept", lambda row: share(row, "kept")),
    ("KL, code", lambda row: figure(row, "kl_code", "{:.2f}")),
)
QUALITY: Columns = (("perplexity, spread", lambda row: figure(row, "perplexity_spread", "{:.1f}")), *CHAT)
RECOVERED: Columns = (("tokens trained on", trained), *QUALITY)
COLUMNS: dict[str, Columns] = {
    "recovery": (
        DENSE_OR_BETA,
        ("minutes asked", lambda row: figure(row, "asked", "{:g}")),
        ("minutes", lambda row: figure(row, "minutes", "{:.0f}")),
        *RECOVERED,
        ("by a sample", lambda row: share(row, "kept_sampled")),
        ("within 8", lambda row: share(row, "kept_within_8")),
    ),
    "memory": (
        ("model", words("model")),
        ("weights", words("weights")),
        ("all on the device", words("device")),
        ("host: device, host", lambda row: f"{row['device_host']}, {row['host']}"),
        ("`--offload`: device, disk", lambda row: f"{row['device_files']}, {row['disk']}"),
        (
            "minutes, estimated",
            lambda row: ", ".join(f"{row[f'minutes_{way}']:.1f}" for way in ("device", "host", "files")),
        ),
    ),
    "uniform": (
        DENSE_OR_BETA,
        ("widths", words("widths")),
        ("β reached", lambda row: figure(row, "achieved_beta", "{:.3f}")),
        *RECOVERED,
        ("llama.cpp", lambda row: speedups(row, "gguf:f16:512")),
        ("ONNX Runtime", lambda row: speedups(row, "onnx:float32:512")),
        ("vLLM, float32", lambda row: speedups(row, "vllm:float32:512")),
        ("vLLM, bfloat16", lambda row: speedups(row, "vllm:bfloat16:512")),
    ),
    "front": (
        ("method", words("method")),
        ("minutes", lambda row: f"{row['minutes']:.1f}" if row["minutes"] else UNKNOWN),
        *PERPLEXITIES,
        *CHAT,
        ("mean accuracy", lambda row: f"{100 * row['accuracy']:.1f} ± {100 * row['accuracy_error']:.1f} %"),
    ),
    "shares": (
        ("preset", words("preset")),
        ("conversations : articles", words("shares")),
        ("tokens", words("tokens")),
        *PERPLEXITIES,
        *CHAT,
    ),
    "targets": (
        ("runtime", lambda row: RUNTIME_NAMES[row["runtime"]]),
        ("plan", words("plan")),
        ("β", lambda row: f"{row['achieved_beta']:.3f}"),
        ("KV groups kept", words("kv_groups")),
        ("FFN channels kept", words("channels")),
        ("predicted", lambda row: f"{row['predicted']:.2f}×"),
        ("measured", lambda row: f"{row['measured']:.2f}×"),
        ("KL, articles b", lambda row: figure(row, "kl_articles", "{:.3f}")),
        *CHAT,
    ),
    "equal_budget": (
        BETA,
        ("seed", words("seed")),
        ("proposer", words("method")),
        ("search text: best start", lambda row: f"{row['best_start']:.1f}"),
        ("found", lambda row: f"{row['fitness']:.1f}"),
        ("articles b", lambda row: f"{row['unseen_perplexity']:.1f}"),
        ("difference, nats", difference),
        ("from", words("control")),
    ),
    "search": (
        BETA,
        ("proposer", words("method")),
        ("best plan from", words("best_from")),
        ("fitness text", lambda row: f"{row['selected']:.4f}"),
        ("unseen text", lambda row: f"{row['elsewhere']:.4f}"),
        ("KL, articles b", lambda row: f"{row['kl_articles']:.3f}"),
        ("difference", difference),
        *CHAT,
    ),
}
"""Columns of a table, by the name of the benchmark's JSON."""


def of_benchmark(name: str) -> str:
    """The rows of `NAME.json` as a Markdown table, and where they were measured."""
    file = Path(__file__).with_name(f"{name}.json")
    return f"{shown(json.loads(file.read_text(encoding='utf-8'))['results'], COLUMNS[name])}\n\n{measured(file)}"


def measured(file: Path) -> str:
    """When and on which machine a benchmark measured, and where its protocol is."""
    content = json.loads(file.read_text(encoding="utf-8"))
    machine = content["machine"]
    on = f"{machine['cpu'].replace('(R)', '').removesuffix(' Processor')}, {machine['cores']} cores"
    return f"Measured on {content['date']}, {on}{', shared' * machine['shared']}; protocol: `benchmarks/{file.name}`."


def shown(rows: Sequence[Row], columns: Columns, *, numbers: bool = False) -> str:
    """Rows as a Markdown table; a column without a figure is left out."""
    cells = {name: [show(row) for row in rows] for name, show in columns}
    cells = {name: column for name, column in cells.items() if {*column} - {UNKNOWN}}
    return markdown([*cells], [*zip(*cells.values(), strict=True)], numbers=numbers)


def markdown(names: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A Markdown table of cells; numbers stand right."""
    rule = ["---:" if numbers else "---"] * len(names)
    return "\n".join(
        f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") for cells in (names, rule, *rows)
    )
