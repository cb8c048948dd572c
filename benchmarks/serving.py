"""Speed and memory of pruned models where models are served: one table of all runtimes, with the ideal beside each.

Run: python benchmarks/serving.py WORK DENSE PRUNED …
WORK keeps exports and rows, and a run that was stopped goes on. DENSE and PRUNED are directories of saved models: the
parent, and its pruned models, such as those at β = 0.3 and 0.5. `--python PATH` names the Python of vLLM's environment;
without it, vLLM is left out. `--help` lists the rest.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from protocol import Rows, write
from tables import RUNTIME_NAMES, speeds

from exporters.benchmark import Passes, benchmark
from exporters.benchmark.report import Phase
from exporters.export import export
from exporters.format import FORMATS
from exporters.machine import usable_threads
from exporters.runtime import Setting
from selfpruner_hub.errors import SelfPrunerError
from selfpruner_hub.progress import Bars
from selfpruner_hub.storage.export_record import read_export
from selfpruner_hub.storage.model_record import read_record

RUNS = (
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("onnx", "float32"),
    ("genai", "float32"),
    ("openvino", "float32"),
    ("gguf", "f16"),
    ("gguf", "q8_0"),
    ("gguf", "q4_k_m"),
    ("vllm", "float32"),
    ("vllm", "bfloat16"),
)


def exported(work: Path, source: Path, runtime: str, dtype: str, longest: int) -> tuple[Path, dict[str, Any]]:
    """Export a model for a runtime, once.

    Args:
        work: Directory of the exports.
        source: Directory of the model.
        runtime: One of `exporters.format.runtimes()`.
        dtype: Dtype of the weights.
        longest: Longest sequence, in tokens.

    Returns:
        The directory that the runtime loads, and figures of the export: its distance from PyTorch's logits, and the
        seconds that it took, if it was made now.
    """
    row = FORMATS[runtime]
    if row.exported is None:
        return source, {}
    directory, timing = work / f"{runtime}-{dtype}" / source.name, dict[str, Any]()
    if not directory.is_dir():
        started = time.perf_counter()
        setting = Setting(usable_threads(), row.device, dtype, longest)
        export(source, row.export_format or runtime, directory, **row.exported(setting))
        timing["export_s"] = round(time.perf_counter() - started, 1)
    return directory, {"max_difference": read_export(directory).max_difference, **timing}


def phase_row(name: str, phase: Phase) -> dict[str, float]:
    """Figures of prefill or decode."""
    return {
        f"{name}_speedup": round(phase.speedup.median, 3),
        f"{name}_speedup_spread": round(phase.speedup.spread, 3),
        f"{name}_ideal": round(phase.ideal, 3),
        f"{name}_of_ideal": round(phase.speedup.median / phase.ideal, 3),
        f"{name}_ms": round(phase.pruned.median, 2),
        f"dense_{name}_ms": round(phase.dense.median, 2),
    }


def compared(
    work: Path, models: tuple[Path, Path], run: tuple[str, str], **sizes: Any
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Compare a pruned model with the dense one in a runtime.

    Args:
        work: Directory of the exports.
        models: Directories of the dense and of the pruned model.
        run: Runtime and dtype.
        **sizes: Fields of `exporters.benchmark.Passes`: prompts, new_tokens, runs, python, text.

    Returns:
        One row per prompt length, and the versions of the libraries.
    """
    runtime, dtype = run
    longest = max(sizes["prompts"]) + sizes["new_tokens"]
    (dense, _), (pruned, export_figures) = (exported(work, model, runtime, dtype, longest) for model in models)
    with Bars() as progress:
        passes = Passes(batches=(1,), dtype=dtype, **sizes)
        report = benchmark(pruned, dense, runtime, passes, progress=progress)
    sides = {"perplexity": report.pruned.quality, "dense_perplexity": report.dense.quality}
    sizes_of = {"mb": pruned, "dense_mb": dense}
    files = {name: round(sum(f.stat().st_size for f in at.rglob("*")) / 1e6, 1) for name, at in sizes_of.items()}
    read = {name: round(quality.perplexity, 2) for name, quality in sides.items() if quality is not None}
    rows = [
        {
            "prompt": case.prompt,
            **phase_row("prefill", case.prefill),
            **phase_row("decode", case.decode),
            "peak_mb": report.pruned.memory["peak_mb"],
            "dense_peak_mb": report.dense.memory["peak_mb"],
            **files,
            **read,
            **export_figures,
        }
        for case in report.cases
    ]
    return rows, report.versions


def main(words: Sequence[str] | None = None) -> None:
    """Time every pruned model and the dense one in every runtime."""
    options = _parser().parse_args(words)
    rows = Rows(options.work / "rows.jsonl")
    betas = {path.name: read_record(path).beta for path in options.pruned}
    sizes = {"prompts": options.prompts, "new_tokens": options.new, "runs": options.passes}
    for run in RUNS:
        own_python = FORMATS[run[0]].elsewhere is not None
        if (options.only and ":".join(run) not in options.only) or (own_python and options.python is None):
            continue
        there = {"python": options.python} if own_python else {}
        if FORMATS[run[0]].scored:
            there["text"] = options.text
        for pruned in options.pruned:
            key = {"runtime": run[0], "dtype": run[1], "model": pruned.name, "beta": betas[pruned.name]}
            if rows.have(**key):
                continue
            try:
                results, versions = compared(options.work, (options.dense, pruned), run, **sizes, **there)
            except SelfPrunerError as error:  # a library that is missing, for example
                print(f"{RUNTIME_NAMES[run[0]]}, {run[1]}: {error}", flush=True)
                break
            for row in results:
                rows.keep({**key, **row, "versions": versions})
    order = [*RUNS]
    ordered = sorted(rows, key=lambda row: (order.index((row["runtime"], row["dtype"])), row["beta"], row["prompt"]))
    print(speeds(ordered))
    write(
        "serving",
        f"{read_record(options.pruned[0]).base_model} and its pruned models, CPU, {torch.get_num_threads()} threads, "
        f"batch 1, {options.new} tokens after a prompt; "
        f"dense and pruned in a process each, turn by turn, medians of {options.passes} passes, each behind one that "
        "does not count; speed-ups of neighbouring passes; ideal: floating-point operations of a prompt, bytes that a "
        "step reads; peak_mb: memory of the process while it ran, libraries included; mb: size of the export, which "
        "has graphs in four dtypes for GenAI; perplexity, where it was measured: in that runtime, on windows of a text "
        "on which nothing was chosen",
        ordered,
        options.output,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("dense", type=Path, metavar="DENSE")
    parser.add_argument("pruned", type=Path, metavar="PRUNED", nargs="+")
    parser.add_argument("--python", type=Path, metavar="PATH", help="the Python of vLLM's environment")
    parser.add_argument("--text", metavar="PATH", help="measure the perplexity on this text too")
    names = [":".join(run) for run in RUNS]
    parser.add_argument("--only", nargs="+", choices=names, help="runtimes and dtypes (default: all)")
    parser.add_argument("--prompts", nargs="+", type=int, default=[128, 512], metavar="N", help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, metavar="N", help="tokens written after it")
    parser.add_argument("--passes", type=int, default=9, metavar="N", help="passes of each model")
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of serving.json (default: benchmarks)")
    return parser


if __name__ == "__main__":
    main()
