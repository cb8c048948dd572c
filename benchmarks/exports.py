"""Speed of pruned models in PyTorch, ONNX Runtime and llama.cpp, and the ideal speed-up.

Run: python benchmarks/exports.py WORK [RUNTIME:DTYPE …]
Models, exports and rows are kept in the directory WORK and reused. If runtimes are named (such as `gguf:f16`), only
those are measured.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from protocol import Rows, write
from serving import exported, phase_row

from exporters.benchmark import benchmark
from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.progress import Bars

RUNS = (("torch", "float32"), ("onnx", "float32"), ("gguf", "f16"))
BETAS = (0.3, 0.5)
WIDTHS: dict[str, dict[str, Any]] = {
    "m1": {"multiple_of": 1, "tied": False},
    "m32": {"multiple_of": 32, "tied": False},
    "t32": {"multiple_of": 32, "tied": True},
}
"""Kinds of pruning: FFN channels only, or (tied) the same share of the attention heads too."""
PROMPTS, NEW_TOKENS, PASSES = (128, 512), 32, 9
SETTINGS: dict[str, Any] = {
    "data": "self",
    "window": 256,
    "calibration_tokens": 4_096,
    "fitness_tokens": 512,
    "sequential_repair": False,
}
"""Cheap settings: speed depends on the widths only."""
DENSE = "dense"


def make_models(work: Path) -> dict[str, dict[str, Any]]:
    """Save the dense model and the uniformly pruned ones."""
    cases = {f"b{100 * beta:.0f}-{name}": {"beta": beta, **widths} for beta in BETAS for name, widths in WIDTHS.items()}
    missing = [name for name in (*cases, DENSE) if not (work / name / "config.json").is_file()]
    if not missing:
        return cases
    pruner = load_embedded(torch.float32)
    for name in cases.keys() & set(missing):
        pruned = pruner.prune(**cases[name], evaluations=0, seeds=("uniform",), **SETTINGS)
        pruned.save_pretrained(work / name)
    pruner.model.save_pretrained(work / DENSE)
    pruner.tokenizer.save_pretrained(work / DENSE)
    return cases


def case_rows(work: Path, name: str, case: dict[str, Any], runtime: str, dtype: str) -> list[dict[str, Any]]:
    """Compare a pruned model with the dense one in a runtime, in one row per prompt length."""
    longest = max(PROMPTS) + NEW_TOKENS
    (dense, _), (directory, made) = (exported(work, work / each, runtime, dtype, longest) for each in (DENSE, name))
    with Bars() as progress:
        report = benchmark(
            directory,
            dense,
            runtime,
            prompts=PROMPTS,
            new_tokens=NEW_TOKENS,
            runs=PASSES,
            dtype=dtype,
            progress=progress,
        )
    return [
        {
            "runtime": runtime,
            "dtype": dtype,
            **case,
            "prompt": measured.prompt,
            **phase_row("prefill", measured.prefill),
            **phase_row("decode", measured.decode),
            "peak_mb": report.pruned.memory["peak_mb"],
            "dense_peak_mb": report.dense.memory["peak_mb"],
            **made,
        }
        for measured in report.cases
    ]


def main(work: Path, only: list[str]) -> None:
    """Time every pruned model and the dense one in every runtime."""
    cases, rows = make_models(work), Rows(work / "rows.jsonl")
    for runtime, dtype in RUNS:
        for name, case in cases.items():
            if (only and f"{runtime}:{dtype}" not in only) or rows.have(runtime=runtime, dtype=dtype, **case):
                continue
            for row in case_rows(work, name, case, runtime, dtype):
                rows.keep(row)
    order = [runtime for runtime, _ in RUNS]
    write(
        "exports",
        "SmolLM2-135M-Instruct, uniform rates of the FFN (tied: of FFN and attention), CPU, "
        f"{torch.get_num_threads()} threads, batch 1, {NEW_TOKENS} tokens after each prompt; dense and pruned in a "
        f"process each, turn by turn, medians of {PASSES} passes, each behind one that does not count; speed-ups of "
        "neighbouring passes; ideal: floating-point operations of a prompt, bytes that a step reads; export_s: of an "
        "export that was made in that run",
        sorted(rows, key=lambda row: order.index(row["runtime"])),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
