"""The table of runtimes: a row for each prompt, kept at once, and taken up again where a run was stopped."""

from __future__ import annotations

import json

import pytest
import serving
import tables
from support.tiny import save_tiny

from exporters.benchmark.latency import Timing
from exporters.benchmark.report import BenchmarkReport, Case, Phase, Quality, Side
from exporters.benchmark.workload import Workload
from selfpruner_hub.errors import UserError


def phase(speedup, ideal):
    times = [Timing(value, 0.1, 3) for value in (speedup * 10, 10, speedup)]
    return Phase(*times, ideal, 100.0, 100.0 * speedup)


def report(prompts, read=None):
    work = Workload(1, 1, 1, 1)
    sides = [
        Side(name, work, {"peak_mb": memory}, read and Quality(perplexity, read, 16, 512))
        for name, memory, perplexity in (("dense", 900.4, 26.7), ("pruned", 700.0, 52.21))
    ]
    cases = tuple(Case(1, prompt, 2, phase(1.5, 1.6), phase(1.25, 1.3)) for prompt in prompts)
    return BenchmarkReport("torch", "float32", "cpu", 1, {}, {"torch": "2"}, *sides, cases)


@pytest.fixture
def run(saved_models, tmp_path, monkeypatch):
    """Run the script on tiny models; gives back what was measured. vLLM fails."""
    dense, measured = save_tiny("llama", tmp_path / "dense"), []

    def benchmark(pruned, dense, runtime, passes, **_):
        if runtime == "vllm":
            assert passes.text is None  # benchmark refuses it for a runtime that gives no logits
            raise UserError("The environment has no vLLM.", "Install it.")
        measured.append((pruned.name, dense.name, runtime, passes.dtype))
        return report(passes.prompts, passes.text)

    monkeypatch.setattr(serving, "benchmark", benchmark)

    def run(*words):
        measured.clear()
        models = [str(saved_models / name) for name in ("second", "first")]
        sizes = ["--prompts", "8", "16", "--new", "2", "--passes", "2", "--output", str(tmp_path)]
        serving.main([str(tmp_path / "work"), str(dense), *models, *sizes, *words])
        return list(measured), json.loads((tmp_path / "serving.json").read_text())["results"]

    return run


def test_every_runtime_that_is_there_is_measured_once(run, capsys):
    only = ("--only", "torch:float32", "vllm:float32")
    measured, rows = run(*only)
    assert measured == [(name, "dense", "torch", "float32") for name in ("second", "first")]
    assert [(row["model"], row["beta"], row["prompt"]) for row in rows] == [
        *(("first", 0.3, prompt) for prompt in (8, 16)),
        *(("second", 0.4, prompt) for prompt in (8, 16)),
    ]
    assert rows[0]["prefill_speedup"] == 1.5
    assert rows[0]["decode_of_ideal"] == round(1.25 / 1.3, 3)
    assert (rows[0]["dense_peak_mb"], rows[0]["peak_mb"]) == (900.4, 700.0)
    line = "| PyTorch, float32 | 0.3 | 1.50 (1.60) | 1.25 (1.30) | 1.50 (1.60) | 1.25 (1.30) | 900 → 700 |"
    assert line in capsys.readouterr().out
    assert run(*only) == ([], rows)
    measured, rows = run("--only", "torch:float32", "torch:bfloat16")
    assert measured == [(name, "dense", "torch", "bfloat16") for name in ("second", "first")]
    assert len(rows) == 8


def test_the_perplexity_where_a_runtime_measures_it(run, capsys):
    run("--only", "torch:float32")
    only = ("torch:float32", "torch:bfloat16", "vllm:float32")
    _, rows = run("--only", *only, "--text", "articles.txt", "--python", "/opt/vllm/bin/python")
    read = {row["dtype"]: (row.get("dense_perplexity"), row.get("perplexity")) for row in rows}
    assert read == {"float32": (None, None), "bfloat16": (26.7, 52.21)}
    assert all(row["mb"] > 0 < row["dense_mb"] for row in rows)
    table = tables.speeds(rows).splitlines()
    assert table[0].endswith("| memory in MB, dense → pruned | perplexity, dense → pruned |")
    assert {line.split("|")[-2].strip() for line in table[2:] if "bfloat16" in line} == {"26.7 → 52.2"}
    assert {line.split("|")[-2].strip() for line in table[2:] if "float32" in line} == {"–"}


def test_a_runtime_that_fails_is_one_line(run, capsys):
    measured, rows = run("--only", "torch:float32", "vllm:float32", "--python", "/opt/vllm/bin/python")
    assert {row["runtime"] for row in rows} == {"torch"}
    assert "vLLM, float32: The environment has no vLLM. Install it." in capsys.readouterr().out.splitlines()


def test_a_runtime_that_is_unknown(run, capsys):
    with pytest.raises(SystemExit):
        run("--only", "gguf:q3")
    assert "invalid choice: 'gguf:q3'" in capsys.readouterr().err


def test_every_row_of_the_table_is_a_runtime():
    for runtime, dtype in serving.RUNS:
        assert dtype in serving.FORMATS[runtime].dtypes()
        assert runtime in tables.RUNTIME_NAMES
