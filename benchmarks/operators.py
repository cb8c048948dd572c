"""Why ONNX Runtime's speed-up is below the ideal: time by operator, dense and pruned.

Run: python benchmarks/operators.py WORK
WORK: the directory of benchmarks/exports.py, whose models and exports are used.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from exports import BETAS, DENSE, NEW_TOKENS, PROMPTS
from protocol import write

from exporters.benchmark.latency import CausalLMRunner
from exporters.to_onnx.causal_lm import OnnxCausalLM, default_options

RUNS = 5
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm")
ATTENTION = ("Attention", "Concat")


def profiled(directory: Path, prefix: str) -> OnnxCausalLM:
    """Load an export with ONNX Runtime's profiler on."""
    options = default_options()
    options.enable_profiling, options.profile_file_prefix = True, prefix
    return OnnxCausalLM.from_pretrained(directory, session_options=options)


def passes(file: str, heads: int) -> list[list[Counter[str]]]:
    """Milliseconds by kind of operator for every call, `1 + NEW_TOKENS` calls per pass, without the first pass."""
    events = json.loads(Path(file).read_text())
    ends = [event["ts"] + event["dur"] for event in events if event["name"] == "model_run"]
    calls = [Counter[str]() for _ in ends]
    number = 0
    nodes = [event for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]
    for event in sorted(nodes, key=lambda event: event["ts"]):
        while event["ts"] > ends[number]:
            number += 1
        calls[number][kind(event, heads)] += event["dur"] / 1000
    size = 1 + NEW_TOKENS
    return [calls[start : start + size] for start in range(size, len(calls), size)]


def kind(event: dict[str, Any], heads: int) -> str:
    """Classify an operator: layer weights, output head, attention with its cache, or the rest."""
    name = event["args"]["op_name"]
    if name in PRODUCTS:
        shapes = [shape for tensor in event["args"].get("input_type_shape", []) for shape in tensor.values()]
        return "head" if any(heads in shape for shape in shapes) else "layer weights"
    return "attention" if name in ATTENTION else "rest"


def medians(taken: list[list[Counter[str]]]) -> dict[str, dict[str, float]]:
    """Medians over passes of the first call (prefill) and of the mean of the others (decode), in milliseconds."""
    kinds = sorted({each for one in taken for call in one for each in call})
    return {
        "prefill": {each: round(statistics.median(one[0][each] for one in taken), 3) for each in kinds},
        "decode": {
            each: round(statistics.median(statistics.mean(call[each] for call in one[1:]) for one in taken), 3)
            for each in kinds
        },
    }


def main(work: Path) -> None:
    """Time the operators of the dense model and of each pruned one, in alternating passes."""
    exports = work / "onnx-float32"
    rows = []
    for name in [f"b{100 * beta:.0f}-m1" for beta in BETAS]:
        for prompt in PROMPTS:
            with tempfile.TemporaryDirectory() as temporary:
                models = {each: profiled(exports / each, f"{temporary}/{each}") for each in (DENSE, name)}
                ids = torch.randint(3, 40_000, (1, prompt), generator=torch.Generator().manual_seed(0))
                for _ in range(1 + RUNS):
                    for model in models.values():
                        CausalLMRunner(model).measure(ids, NEW_TOKENS)
                found = {
                    each: medians(passes(model.session.end_profiling(), model.config.vocab_size))
                    for each, model in models.items()
                }
            for phase in ("prefill", "decode"):
                dense, pruned = found[DENSE][phase], found[name][phase]
                rows.append(
                    {
                        "model": name,
                        "prompt": prompt,
                        "phase": phase,
                        "dense_ms": dense,
                        "pruned_ms": pruned,
                        "speedup": {each: round(dense[each] / pruned[each], 3) for each in dense},
                        "in_all": round(sum(dense.values()) / sum(pruned.values()), 3),
                    }
                )
                print(rows[-1], flush=True)
    write(
        "operators",
        f"SmolLM2-135M-Instruct in ONNX Runtime, float32, batch 1, {NEW_TOKENS} tokens after each prompt: milliseconds "
        f"by kind of operator as its profiler gives them, medians of {RUNS} passes, dense and pruned in turn",
        rows,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
