"""The benchmark, end to end: two models, each in its own process, figures that come from them, and an honest table."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from support.checks import check_cache
from support.mixtures import MIXTURES
from support.tiny import save_tiny, tiny_model
from support.trained import TEXT, VOCABULARY, trained_tokenizer

from exporters import OnnxCausalLM
from exporters.benchmark import Passes, benchmark
from exporters.benchmark import compare as module
from exporters.benchmark.latency import timing
from exporters.benchmark.report import BenchmarkReport
from exporters.benchmark.worker import started
from exporters.benchmark.workload import workload_of
from exporters.export import export
from exporters.format import FORMATS, OtherPython
from exporters.runtime import Measured, Setting
from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.cli import main
from selfpruner_hub.errors import ModelError, SavedModelError, UserError
from selfpruner_hub.evaluation.metrics import perplexity
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, ExportRecord, read_export
from selfpruner_hub.storage.layout import EXPORTS
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.heavy
SMALL = ("--prompt", "16,40", "--batch", "1,2", "--new", "4", "--runs", "3", "--threads", "1", "--quiet")
SHORT = Passes(prompts=(8,), new_tokens=1, runs=2)
SETTING = Setting(threads=1, device="cpu", dtype="float32", longest=64)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a dense model and of a pruned one, with a tokenizer that llama.cpp knows."""
    directory = tmp_path_factory.mktemp("pair")
    dense, tokenizer = tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2), trained_tokenizer()
    dense.save_pretrained(directory / "dense")
    tokenizer.save_pretrained(directory / "dense")
    pruned = AutoPruner(dense, tokenizer, "tests/llama").prune(
        0.5, data="self", proposer="evolution", window=32, calibration_tokens=512, fitness_tokens=128, evaluations=0,
        seeds=("ramp",), progress=False,
    )  # fmt: skip
    pruned.save_pretrained(directory / "pruned")
    return directory / "dense", directory / "pruned"


@pytest.fixture(scope="module")
def report(pair, tmp_path_factory):
    """What the command line wrote for PyTorch."""
    output = tmp_path_factory.mktemp("reports") / "torch.json"
    arguments = ["benchmark", str(pair[1]), "--against", str(pair[0]), *SMALL, "--output", str(output)]
    assert main(arguments) == 0
    return BenchmarkReport.from_json(output.read_text(), str(output))


def test_every_case_is_measured(report):
    assert [(c.batch, c.prompt, c.new_tokens) for c in report.cases] == [(1, 16, 4), (1, 40, 4), (2, 16, 4), (2, 40, 4)]
    for case in report.cases:
        for phase, tokens in ((case.prefill, case.batch * case.prompt), (case.decode, case.batch)):
            assert phase.dense.runs == phase.pruned.runs == phase.speedup.runs == 3
            assert 0 < phase.dense.median < 10_000
            assert phase.dense_tokens_per_second == pytest.approx(1000 * tokens / phase.dense.median, rel=0.01)
            assert phase.speedup.median > 0
            assert 1 < phase.ideal < 2  # half of the layers is gone, the head is not
    assert report.runtime == "torch"
    assert report.threads == 1
    assert report.machine["processor"]
    assert {"torch", "transformers"} <= set(report.versions)


def test_memory_is_that_of_each_process(report):
    for side in (report.dense, report.pruned):
        assert 100 < side.memory["peak_mb"] < 2000
        assert side.memory["peak_mb"] <= side.memory["loading_mb"] * 1.5


def test_the_work_of_both_sides(report, pair):
    assert report.dense.name == "dense"
    assert report.dense.workload.layer_weights > 1.9 * report.pruned.workload.layer_weights
    pruned = PrunedModel.from_pretrained(pair[1]).model
    weights = sum(p.numel() for n, p in pruned.named_parameters() if ".layers." in n and p.ndim == 2)
    assert report.pruned.workload.layer_weights == weights


def test_a_mixture_has_no_ideal(report):
    """Its work depends on where tokens are routed, and attention is not among its prunable weights."""
    assert workload_of(MIXTURES["qwen3_moe"]) is None
    case = report.cases[0]
    phases = {name: replace(getattr(case, name), ideal=None) for name in ("prefill", "decode")}
    sides = {name: replace(getattr(report, name), workload=None) for name in ("dense", "pruned")}
    mixture = replace(report, cases=(replace(case, **phases),), **sides)
    assert BenchmarkReport.from_json(mixture.to_json(), "x") == mixture
    assert not any("by work" in metric.protocol for metric in mixture.metrics().values())
    assert mixture.table().count("×") < replace(report, cases=(case,)).table().count("×")


def test_the_record_is_read_strictly(report):
    assert BenchmarkReport.from_json(report.to_json(), "x") == report
    values = json.loads(report.to_json())
    for broken, says in (
        ({**values, "schema_version": 9}, "schema version 9"),
        ({**values, "more": 1}, "more"),
        ({**values, "cases": [{"batch": 1}]}, "x is damaged"),
        ({**values, "dense": {**values["dense"], "workload": {}}}, "x is damaged"),
    ):
        with pytest.raises(SavedModelError, match=says):
            BenchmarkReport.from_json(json.dumps(broken), "x")
    with pytest.raises(SavedModelError, match="x is damaged"):
        BenchmarkReport.from_json("{", "x")


def test_the_table_says_what_is_not_faster(report):
    case, even = report.cases[0], timing([1.0, 1.0, 1.0])
    quick = replace(case.prefill, speedup=timing([1.4, 1.5, 1.6]))
    slow, unsure = replace(case.decode, speedup=timing([0.9, 0.95, 1.0])), replace(case.decode, speedup=even)
    assert quick.faster
    assert not slow.faster
    assert not unsure.faster
    table = replace(report, cases=(replace(case, prefill=quick, decode=slow),)).table()
    assert "1.50 ± 0.10×" in table
    assert table.endswith("The pruned model is not faster, or not by more than the spread: decode of 1 × 16 (0.95×).")
    assert "peak memory" in table
    assert "not faster" not in replace(report, cases=(replace(case, prefill=quick, decode=quick),)).table()


class Drifting:
    """A worker without a process: each pass of it takes twice as long as the one before."""

    costs: ClassVar = {"dense": 3.0, "pruned": 2.0}

    def __init__(self, name):
        self.cost, self.passes = self.costs[Path(name).name], 0

    def measure(self, _ids, _new):
        self.passes += 1
        return Measured(self.cost * 2**self.passes, self.cost)

    def memory(self):
        return {"peak_mb": 1.0, "loading_mb": 1.0}


@pytest.fixture
def drifting(monkeypatch):
    """No process is started; what would have been is listed."""
    listed = []

    @contextmanager
    def start(runtime, name, _setting):
        listed.append((runtime, name))
        yield Drifting(name)

    monkeypatch.setattr(module, "started", start)
    return listed


def test_a_speed_up_is_that_of_neighbours(pair, drifting):
    """The machine slows down while the benchmark runs; the ratio of the two models stays what it is."""
    (case,) = benchmark(pair[1], pair[0], passes=Passes(prompts=(8,), new_tokens=2, runs=5)).cases
    assert case.prefill.speedup == timing([1.5] * 5)
    assert case.decode.speedup == timing([1.5] * 5)
    assert drifting == [("torch", str(pair[0])), ("torch", str(pair[1]))]


def test_progress_goes_to_the_end(pair, drifting):
    seen = []
    benchmark(pair[1], pair[0], passes=SHORT, progress=lambda *at: seen.append(at))
    assert seen == [("batch 1, prompt 8", step, 8) for step in range(1, 9)]


def test_figures_go_into_the_record_and_the_card(pair, drifting, tmp_path, capsys):
    pruned = shutil.copytree(pair[1], tmp_path / "pruned")
    words = [str(pruned), "--against", str(pair[0]), "--prompt", "8", "--new", "2", "--runs", "2", "--quiet"]
    assert main(["benchmark", *words, "--save"]) == 0
    found, card = read_record(pruned).metrics, (pruned / "README.md").read_text()
    assert set(found) == {"prefill in torch, 1 × 8 tokens", "decode in torch, 1 × 8 tokens"} | set(
        read_record(pair[1]).metrics
    )
    for name, metric in found.items():
        if metric.machine:
            assert f"| {name} | {metric.dense} ms | {metric.value} ms |" in card
    assert main(["benchmark", str(pair[0]), *words[1:], "--save"]) == 2
    assert "is not a model that selfpruner saved" in capsys.readouterr().err


@pytest.mark.parametrize("exported", [False, True])
def test_figures_beside_those_of_another_model_are_not_saved(exported, pair, drifting, tmp_path, capsys):
    pruned = shutil.copytree(pair[1], tmp_path / "pruned")
    other = tmp_path / "other"
    tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2 if not exported else 3, seed=7).save_pretrained(
        other
    )
    trained_tokenizer().save_pretrained(other)
    if exported:
        assert main(["export", str(other), "--to", "gguf", "--output", str(tmp_path / "export"), "--quiet"]) == 0
        other = tmp_path / "export"
    before = (pruned / "selfpruner.json").read_text()
    small = ["--prompt", "8", "--new", "2", "--runs", "2", "--quiet"]
    assert main(["benchmark", str(pruned), "--against", str(other), *small, "--save"]) == 2
    assert "is not 'tests/llama', the parent of this model: other " in capsys.readouterr().err
    assert not drifting
    assert (pruned / "selfpruner.json").read_text() == before


def test_an_export_is_taken_as_it_is(pair, drifting, tmp_path):
    source = {"name": "a", **identity_of(tiny_model("llama"))}
    for side, dtype in zip(pair, ("f16", "q4_k_m"), strict=True):
        shutil.copytree(side, tmp_path / side.name)
        record = ExportRecord("gguf", {"dtype": dtype}, source, {"torch": "2"}, 0.1, 0.0, "", "")
        (tmp_path / side.name / EXPORT_RECORD_FILE).write_text(record.to_json())
    with pytest.raises(UserError, match="is an export in q4_k_m, and f16 would be timed"):
        benchmark(tmp_path / "pruned", tmp_path / "dense", "gguf", SHORT)
    with pytest.raises(UserError, match="is an export in f16, and q4_k_m would be timed"):
        benchmark(tmp_path / "pruned", tmp_path / "dense", "gguf", replace(SHORT, dtype="q4_k_m"))
    assert not drifting
    shutil.copy(tmp_path / "dense" / EXPORT_RECORD_FILE, tmp_path / "pruned")
    benchmark(tmp_path / "pruned", tmp_path / "dense", "gguf", SHORT)
    assert drifting == [("gguf", str(tmp_path / "dense")), ("gguf", str(tmp_path / "pruned"))]


def test_a_report_does_not_replace_a_directory(pair, drifting, tmp_path, capsys):
    words = ["benchmark", str(pair[1]), "--against", str(pair[0]), "--output", str(tmp_path), "--quiet"]
    assert main(words) == 2
    assert "is a directory. Name a file" in capsys.readouterr().err
    assert not drifting


@pytest.mark.parametrize(
    ("runtime", "library", "dtype", "weights", "size", "allowed"),
    [
        ("gguf", "xllamacpp", "q4_k_m", "model-q4_k_m.gguf", 2.4, math.inf),
        ("onnx", "onnxruntime", "float16", "model.onnx.data", 2.4, 0.02),
        ("openvino", "openvino", "float16", "openvino_model.bin", 2.2, 0.02),
    ],
)
@pytest.mark.usefixtures("forked_workers")
def test_exports(runtime, library, dtype, weights, size, allowed, pair, tmp_path, capsys):
    """The runtime is timed, and has the perplexity of PyTorch: random models, so blocks change it little."""
    pytest.importorskip(library)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXT * 20))
    arguments = ["benchmark", str(pair[1]), "--against", str(pair[0]), "--runtime", runtime, "--dtype", dtype]
    arguments += ["--prompt", "16", "--new", "4", "--runs", "2", "--threads", "1", "--exports", str(tmp_path)]
    arguments += ["--text", str(text)]
    assert main([*arguments, "--quiet", "--json"]) == 0
    found = BenchmarkReport.from_json(capsys.readouterr().out, "stdout")
    assert (found.runtime, found.dtype) == (runtime, dtype)
    assert library in found.versions
    assert found.cases[0].decode.pruned.median > 0
    windows = consecutive_windows(str(text), trained_tokenizer(), 128, 16).windows
    for side, directory in zip(("dense", "pruned"), pair, strict=True):
        record, model = read_export(tmp_path / side), load_model(str(directory), dtype=torch.float32)[0]
        assert 0 < record.max_difference <= min(record.tolerance, allowed)
        parameters = sum(p.numel() for p in model.parameters())
        assert (tmp_path / side / weights).stat().st_size < size * parameters + 2**14
        if runtime == "onnx":
            graph = OnnxCausalLM.from_pretrained(tmp_path / side)
            assert graph.dtype == torch.float16
            check_cache(graph, windows[:2, :10], new_tokens=4)
        quality = getattr(found, side).quality
        assert (quality.text, quality.windows, quality.window) == ("text.txt", 16, 128)
        expected = perplexity(model, windows)
        assert quality.perplexity == pytest.approx(expected, rel=0.2 if "q4" in dtype else 0.02)
    assert "16 windows of text.txt" in found.table()
    assert found.metrics()[f"perplexity in {runtime}, {dtype}"].value == round(found.pruned.quality.perplexity, 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--runtime", "caffe"), "Unknown runtime 'caffe'"),
        (("--dtype", "q8_0"), "Unknown dtype 'q8_0'. Choose float32, bfloat16, float16."),
        (("--runtime", "gguf", "--batch", "2"), "gguf is timed on one prompt at a time"),
        (("--batch", "0"), "--batch expects whole numbers"),
        (("--prompt", "1,x"), "--prompt expects whole numbers"),
        (("--new", "1,2"), "--new expects a whole number"),
        (("--runs", "1"), "runs at least 2"),
        (("--runtime", "genai", "--text", "wikitext2"), "genai is timed here, not scored on text"),
        (("--text", "none.txt"), "Cannot read the text 'none.txt'"),
        (("--prompt", "16,128"), "A prompt of 128 tokens and 32 after it are more than 120, all that the models were"),
    ],
)
def test_mistakes(arguments, says, pair, capsys):
    assert main(["benchmark", str(pair[1]), "--against", str(pair[0]), *arguments, "--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("selfpruner: ")
    assert says in err
    assert err.count("\n") == 1


def test_prompts_are_those_that_the_models_can_read(pair, drifting):
    (case,) = benchmark(pair[1], pair[0], passes=Passes(new_tokens=2, runs=2)).cases
    assert case.prompt == 118  # of 128 tokens, 2 that are written and 8 to spare


def test_without_a_gpu(pair, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="tensorrt cannot run on cuda: PyTorch sees no NVIDIA GPU"):
        benchmark(pair[1], pair[0], "tensorrt")
    with pytest.raises(UserError, match="torch cannot run on cuda:1"):
        benchmark(pair[1], pair[0], passes=Passes(device="cuda:1"))


def test_foreign_input(pair, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "no-weights").mkdir()
    (tmp_path / "no-weights" / "config.json").write_text((pair[0] / "config.json").read_text())
    other = save_tiny("llama", tmp_path / "other")
    capsys.readouterr()
    for name, says in (
        (empty, "holds no model"),
        (tmp_path / "no-weights", "no-weights"),
        (tmp_path / "none", "no local directory"),
        (other, "different vocabularies"),
    ):
        assert main(["benchmark", str(pair[1]), "--against", str(name), "--quiet"]) == 2
        err = capsys.readouterr().err
        assert says in err
        assert err.count("\n") == 1
    export(pair[0], "gguf", tmp_path / "gguf")
    with pytest.raises(SavedModelError, match="export to gguf, not to openvino"):
        FORMATS["openvino"].read(tmp_path / "gguf")


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="holds no model"), started("torch", str(tmp_path), SETTING):
        pytest.fail("there is no model")


@pytest.fixture
def sleeping(tmp_path, monkeypatch):
    """A runtime whose program answers that it has loaded a model, and then nothing."""
    program = tmp_path / "sleeping.py"
    program.write_text("import time\ninput()\nprint('{\"result\": null}', flush=True)\ntime.sleep(600)\n")
    entry = replace(FORMATS["torch"], elsewhere=OtherPython(program, dict, lambda name, *_: name))
    monkeypatch.setitem(sys.modules, "sleeping", SimpleNamespace(FORMAT=entry))
    monkeypatch.setitem(EXPORTS, "sleeping", "sleeping")
    return started("sleeping", "a model", replace(SETTING, python=sys.executable))


def test_a_worker_that_dies_is_one_line(sleeping):
    with sleeping as worker:
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(ModelError, match="The process that ran 'a model' ended with status -9"):
            worker.measure(torch.ones(1, 8, dtype=torch.long), 1)


def test_no_process_is_left(sleeping):
    with sleeping as worker:
        process = worker._process
        assert process.poll() is None
    assert process.poll() is not None


@pytest.mark.usefixtures("forked_workers")
def test_a_worker_that_fails_says_how(pair):
    with started("torch", str(pair[0]), SETTING) as worker:
        assert worker.measure(torch.ones(1, 8, dtype=torch.long), 1).prefill > 0
        with pytest.raises(ModelError, match="index out of range"):
            worker.measure(torch.full((1, 8), 10**6), 1)


@pytest.mark.gpu
@pytest.mark.parametrize("runtime", ["torch", "tensorrt"])
def test_on_a_gpu(runtime, pair):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    passes = Passes(prompts=(16,), batches=(2,), new_tokens=4, runs=2, device="cuda")
    found = benchmark(pair[1], pair[0], runtime, passes)
    assert found.device == "cuda"
    assert found.machine["gpu"]
    assert found.cases[0].decode.pruned.median > 0
    if runtime == "torch":
        assert 0 < found.dense.memory["gpu_mb"] < 1000
