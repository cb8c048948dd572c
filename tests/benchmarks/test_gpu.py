"""The GPU benchmark on a CPU: every part on tiny models, the budget of seconds, and why figures are missing."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu
import gpu_speed
import gpu_stages
import pytest
import torch
from gpu_bench import SIZES, TINY, Bench, random_model
from support.tiny import tiny_model, tiny_pruned

from exporters.benchmark.latency import Timing
from exporters.benchmark.report import Case, Phase
from selfpruner_hub.errors import ExportError
from selfpruner_hub.settings import PruneSettings

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path):
    return Bench(CPU, True, tmp_path / "out", time.monotonic() + 600)


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("PyTorch sees no NVIDIA GPU here.")
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 2
    assert "Add --tiny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_parts_fit_into_nine_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= gpu.SECONDS < 540
    assert all(part.needs < part.seconds for part in gpu.PARTS.values())


def test_parts_without_time_are_skipped_and_say_why(bench, monkeypatch):
    """The first takes more than its budget; the second gets what is left, and there is too little for the third."""
    parts = {name: gpu.Part(lambda *_: None, 60.0, 20.0) for name in ("first", "second", "third")}
    monkeypatch.setattr(gpu, "PARTS", parts)
    now = SimpleNamespace(monotonic=lambda: now.time, time=0.0)
    monkeypatch.setattr("gpu.time", now)
    monkeypatch.setattr("gpu_bench.time", now)
    bench.deadline, given = 180.0, []

    def apart(name, own):
        given.append((name, own.left()))
        now.time += 140.0 if name == "first" else 35.0
        return "after 140 s" if name == "first" else ""

    gpu.run(list(parts), bench, apart)
    assert given == [("first", 60.0), ("second", 40.0)]
    assert bench.rows() == [
        {"part": "first", "stopped": "after 140 s"},
        {"part": "third", "skipped": "5 s were left, and it needs 20 s"},
    ]


def test_a_part_gets_what_those_before_it_left(bench, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {name: gpu.Part(lambda *_: None, 60.0, 20.0) for name in ("first", "second")})
    bench.deadline, given = time.monotonic() + 120, []
    gpu.run(["first", "second"], bench, lambda name, own: given.append(own.left()) or "")
    assert given == pytest.approx([60, 120], abs=1)
    assert bench.rows() == []


def test_a_part_that_takes_too_long_ends_with_its_processes(bench, tmp_path, monkeypatch):
    bench.deadline = time.monotonic() + 1
    late = tmp_path / "late"
    monkeypatch.setattr(gpu, "command", lambda *_: ["sh", "-c", f"(sleep 2; touch {late}) & wait"])
    assert gpu.in_a_process("tests", bench) == "after 1 s, which are its budget"
    time.sleep(1.5)
    assert not late.exists()


@pytest.mark.parametrize(
    ("line", "why"), [("exit 0", ""), ("echo first; echo last >&2; exit 3", "with status 3: last")]
)
def test_how_a_part_ends(line, why, bench, monkeypatch):
    monkeypatch.setattr(gpu, "command", lambda *_: ["sh", "-c", line])
    assert gpu.in_a_process("tests", bench) == why


def test_a_part_runs_alone_by_its_command(bench, monkeypatch):
    seen = []
    part = gpu.Part(lambda own, name: seen.append((name, own)), 60.0, 20.0)
    monkeypatch.setattr(gpu, "PARTS", {"onnx": part})
    python, script, *words = gpu.command("onnx", bench)
    assert (python, script) == (sys.executable, gpu.__file__)
    assert gpu.main(words) == 0
    ((name, own),) = seen
    assert (name, own.device, own.tiny, own.output) == ("onnx", CPU, True, bench.output)
    assert own.left() == pytest.approx(bench.left(), abs=1)


def test_what_pytest_said(bench, tmp_path, monkeypatch):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n@pytest.mark.gpu\ndef test_good(): pass\n@pytest.mark.gpu\ndef test_bad(): assert 0\n"
        "def test_other(): assert 0\n"
    )
    (tmp_path / "test_broken.py").write_text("import what_is_not_installed\n")
    here = ("-c", "/dev/null", "--rootdir", str(tmp_path), str(tmp_path))
    monkeypatch.setattr(gpu, "FILES", ())
    monkeypatch.setattr(gpu, "TESTS", (*gpu.TESTS, *here))
    gpu.PARTS["tests"].run(bench, "tests")
    passed, row = bench.rows()
    assert (passed["test"].split("::")[1], passed["outcome"]) == ("test_good", "passed")
    assert "1 failed, 1 passed, 1 deselected" in row["summary"]
    assert "1 error" in row["summary"]
    failure, error = row["failures"]
    assert "test_two.py::test_bad" in failure
    assert "test_broken.py" in error
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pytest" else found(name))
    gpu.PARTS["tests"].run(bench, "tests")
    assert bench.rows()[2] == {"part": "tests", "not_installed": "pytest is not installed."}


def test_the_files_with_tests_of_a_gpu_are_named():
    """All but this one, which has tests of the benchmark itself."""
    root = Path(__file__).parents[2]
    marked = {path for path in (root / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text()}
    assert {root / name for name in gpu.FILES} == marked - {Path(__file__)}


def test_what_a_model_writes_and_how_a_layer_is_copied(bench):
    gpu.PARTS["writing-8b"].run(bench, "writing-8b")
    gpu.PARTS["copies"].run(bench, "copies")
    written, *copied = bench.rows()
    assert written["tokens_per_second"] > 0
    assert [row["resting"] for row in copied] == ["memory", "files"]
    assert all(row["gb_per_second"] > 0 for row in copied)


def test_one_layer_reads_as_much_as_a_default_run():
    assert gpu_stages.TOKENS["8b-layer"] == PruneSettings().calibration_tokens
    assert SIZES["8b-layer"] == {**SIZES["8b"], "num_hidden_layers": 1}


def test_seconds_and_memory_of_every_stage(bench):
    gpu.PARTS["stages-1b"].run(bench, "stages-1b")
    content = json.loads((bench.output / "gpu.json").read_text())
    assert content["protocol"]
    rows = content["results"]
    assert [row["stage"] for row in rows] == ["building", *gpu_stages.STAGES]
    for row in rows:
        assert row["part"] == "stages-1b"
        assert row["seconds"] > 0
        assert row["peak_mb"] >= row["start_mb"] > 0
        assert row["tokens"] == gpu_stages.TINY_TOKENS


def test_a_stage_that_runs_out_of_memory(bench, monkeypatch):
    def too_much(*_args, **_more):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 822.00 MiB.\nMore of it.")

    monkeypatch.setattr(gpu_stages, "prepared", too_much)
    gpu_stages.stages(bench, "stages-8b", "8b")
    rows = bench.rows()
    assert rows[2]["stage"] == gpu_stages.STAGES[1]
    assert rows[2]["out_of_memory"] == "CUDA out of memory. Tried to allocate 822.00 MiB."
    assert rows[2]["peak_mb"] > 0
    assert [row["stage"] for row in rows[3:]] == list(gpu_stages.STAGES[2:])
    assert {row["skipped"] for row in rows[3:]} == {f"{gpu_stages.STAGES[1]} ran out of memory"}
    monkeypatch.setattr(gpu_stages, "prepared", lambda *_args, **_more: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu_stages.stages(bench, "stages-8b", "8b")


@pytest.mark.parametrize("make", [tiny_model, tiny_pruned])
def test_fixed_tensors_generate_what_the_model_does(make):
    """Also for layers with KV heads of their own, twice in the same tensors, and as a graph replays them."""
    model, replayed = make("llama"), []
    runner = gpu_speed.GraphRunner(model, 2, 9, 6, lambda function: replayed.append(function) or function)
    assert len(replayed) == 2
    for seed in range(2):
        ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(seed))
        runner.ids.copy_(ids)
        runner.prefill()
        found = [runner.token.clone()]
        for _ in range(6):
            runner.step()
            found.append(runner.token.clone())
        with torch.no_grad():
            for _ in found:
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert torch.cat(found, 1).tolist() == ids[:, 9:].tolist()


def test_kinds_of_plans():
    """One has KV heads that differ between layers; the others leave attention alone."""
    heads = {
        kind.seed + str(kind.multiple_of): {w.num_key_value_heads for w in kind.plan(TINY, 0.5).layers}
        for kind in gpu_speed.KINDS
    }
    assert heads["uniform1"] == heads["uniform64"] == {TINY["num_key_value_heads"]}
    assert len(heads["ramp64"]) > 1


def test_tokens_a_second_of_dense_and_pruned(bench, monkeypatch):
    """Every kind at both rates; without time, the models behind it are skipped."""
    monkeypatch.setattr(gpu_speed, "KINDS", gpu_speed.KINDS[1:2])
    gpu.PARTS["speed-8b"].run(bench, "speed-8b")
    rows = bench.rows()
    assert [(row["beta"], row["batch"]) for row in rows] == [(beta, n) for beta in (0, 0.3, 0.5) for n in (1, 3)]
    for row in rows:
        assert row["cuda_graphs"] is False
        tokens, took = row["batch"] * row["prompt"], row["prefill"]["milliseconds"]["median"]
        assert row["prefill"]["tokens_per_second"] == pytest.approx(1000 * tokens / took, rel=1e-3, abs=0.06)
        took = row["decode"]["milliseconds"]["median"]
        assert row["decode"]["tokens_per_second"] == pytest.approx(1000 * row["batch"] / took, rel=1e-3, abs=0.06)
    assert all(set(row["ideal"].values()) == {1.0} for row in rows[:2])
    assert 1 < rows[2]["ideal"]["decode"] < rows[4]["ideal"]["decode"]
    ratio = rows[0]["decode"]["milliseconds"]["median"] / rows[4]["decode"]["milliseconds"]["median"]
    assert rows[4]["speedup"]["decode"] == pytest.approx(ratio, rel=1e-2)
    bench.deadline = time.monotonic() - 1
    gpu.PARTS["speed-8b"].run(bench, "speed-8b")
    assert "0 s were left; a model took" in bench.rows()[-1]["skipped"]


def test_where_no_graph_can_be_captured(bench, monkeypatch):
    def refused(_function):
        raise RuntimeError("operation not permitted when stream is capturing\nmore of it")

    monkeypatch.setattr(gpu_speed, "capture", refused)
    monkeypatch.setattr(gpu_speed, "_has_graphs", lambda _device: True)
    found = gpu_speed._timed(bench, random_model(TINY, CPU), 1)
    assert found["cuda_graphs"] == "no: operation not permitted when stream is capturing"
    assert found["decode"].median > 0


def test_other_runtimes(bench, monkeypatch):
    """What is exported and timed, with `exporters`' own functions stubbed: their tests run them."""
    exported, timed = [], []

    def timing(pruned, against, runtime, passes):
        timed.append((pruned.name, against.name, runtime, passes.batches, passes.device))
        phase = Phase(*[Timing(1.0, 0.1, 2)] * 3, 1.4, 10.0, 14.0)
        return SimpleNamespace(cases=[Case(1, 12, 4, phase, phase)])

    monkeypatch.setattr(gpu_speed, "benchmark", timing)
    monkeypatch.setattr(
        gpu_speed, "export_model", lambda _model, _, to, out, **how: exported.append((out.name, to, how))
    )
    monkeypatch.setattr(gpu_speed, "_missing", lambda *_: None)
    gpu.PARTS["onnx"].run(bench, "onnx")
    assert exported == [(name, "onnx", {"dtype": "float32", "fusions": "cpu"}) for name in ("0.0", "0.3", "0.5")]
    assert timed == [(f"{beta}", "0.0", "onnx", (1, 3), "cpu") for beta in (0.3, 0.5)]
    rows = bench.rows()
    assert [(row["beta"], row["decode"]["ideal"]) for row in rows] == [(0.3, 1.4), (0.5, 1.4)]

    def fails(*_args, **_more):
        raise ExportError("The model cannot be traced.")

    monkeypatch.setattr(gpu_speed, "export_model", fails)
    gpu.PARTS["onnx"].run(bench, "onnx")
    assert bench.rows()[2]["failed"] == "The model cannot be traced."
    assert len(bench.rows()) == 3


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.usefixtures("forked_workers")
def test_a_runtime_for_real(bench, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(gpu_speed, "BETAS", (0.3,))
    monkeypatch.setattr(gpu_speed, "TINY_BATCHES", (2,))
    gpu.PARTS["onnx"].run(bench, "onnx")
    (row,) = bench.rows()
    assert (row["runtime"], row["beta"], row["batch"]) == ("onnx", 0.3, 2)
    assert row["decode"]["pruned_tokens_per_second"] > 0
    assert row["decode"]["ideal"] > 1


def test_runtimes_that_are_not_installed(bench, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace(get_available_providers=lambda: ["CPU"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: True)
    assert "onnxruntime-gpu is not installed" in gpu_speed._missing(torch.device("cuda"), "onnx")
    assert gpu_speed._missing(CPU, "onnx") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert gpu_speed._missing(CPU, "onnx") == "onnxruntime is not installed."
    for name in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, name, None)
    gpu.PARTS["tensorrt"].run(bench, "tensorrt")
    (row,) = bench.rows()
    assert row == {"part": "tensorrt", "runtime": "tensorrt", "not_installed": "TensorRT is not installed."}
