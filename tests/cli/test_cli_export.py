"""`selfpruner export`, `PrunedModel.export` and `optimum-cli export selfpruned`: three doors to the same exporters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.tiny import save_tiny, tiny_model
from support.trained import VOCABULARY, trained_tokenizer

from exporters import OnnxCausalLM
from selfpruner_hub import AutoPruner, PrunedModel
from selfpruner_hub.cli import main
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.storage.export_record import read_export
from selfpruner_hub.storage.model_record import read_record

RECORD = "selfpruner_export.json"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A tiny pruned model, saved."""
    model = tiny_model("llama", num_hidden_layers=2, vocab_size=VOCABULARY)
    pruner = AutoPruner(model, trained_tokenizer(), "tests/llama")
    settings = {"data": "self", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 128, "progress": False}
    directory = tmp_path_factory.mktemp("models") / "small"
    pruner.prune(0.3, evaluations=0, seeds=("uniform",), **settings).save_pretrained(directory)
    return directory


@pytest.fixture
def run(capsys):
    def run(*words):
        capsys.readouterr()  # what the test itself has saved
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.slow
def test_onnx(run, pruned, tmp_path):
    status, out, err = run("export", pruned, "--to", "onnx", "--output", tmp_path / "out")
    assert status == 0
    assert out.startswith(f"{tmp_path / 'out'}: logits within ")
    assert "of PyTorch's float32 (1.0e-03 is allowed)\n" in out
    assert "comparing with PyTorch" in err
    assert {"model.onnx", "model.onnx.data", "selfpruner.json", "tokenizer.json", RECORD} <= files(tmp_path / "out")
    assert read_record(tmp_path / "out") == read_record(pruned)
    saved = PrunedModel.from_pretrained(pruned, dtype=torch.float32).model
    assert read_export(tmp_path / "out").source == {"name": "small", **identity_of(saved)}
    ids = torch.randint(3, 128, (1, 10))
    expected = PrunedModel.from_pretrained(pruned, dtype=torch.float32).model.generate(ids, max_new_tokens=8)
    assert OnnxCausalLM.from_pretrained(tmp_path / "out").generate(ids, max_new_tokens=8).tolist() == expected.tolist()


def test_a_dense_model_as_json(run, tmp_path):
    dense = save_tiny("qwen2", tmp_path / "dense", vocab_size=VOCABULARY)
    trained_tokenizer().save_pretrained(dense)
    status, out, err = run("export", dense, "--to", "gguf", "--output", tmp_path / "out", "--json", "--quiet")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told.pop("output") == str(tmp_path / "out")
    assert told == json.loads((tmp_path / "out" / RECORD).read_text())
    assert told["format"] == "gguf"
    assert "selfpruner.json" not in files(tmp_path / "out")


def test_from_python(pruned, tmp_path):
    model = PrunedModel.from_pretrained(pruned)
    assert model.export("gguf", tmp_path / "out", dtype="f16") == tmp_path / "out"
    record = read_export(tmp_path / "out", "gguf")
    assert record.options["dtype"] == "f16"
    assert record.source["name"] == "tests/llama at β = 0.3"
    assert read_record(tmp_path / "out") == model.report
    assert next(model.model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "onyx"], "Unknown format 'onyx'. Choose onnx, tensorrt, openvino, gguf."),
        (["--to", "onnx", "--dtype", "q8_0"], "Unknown dtype 'q8_0'. Choose float32, float16, int8."),
        (["--to", "onnx", "--context", "8"], "An export to onnx has no option 'context'. It takes dtype,"),
        (["--to", "gguf", "--compute-capability", "8.6"], "An export to gguf has no option 'compute_capability'."),
        (["--to", "gguf", "--output", "file"], "Cannot write 'file': Not a directory."),
    ],
)
def test_mistakes(words, said, run, pruned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    status, out, err = run("export", pruned, "--output", "out", *words, "--quiet")
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert files(tmp_path) == {"file"}


@pytest.mark.parametrize("source", ["nowhere", "empty", "its own output"])
def test_a_source_that_cannot_be_exported(source, run, pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    name = {"nowhere": tmp_path / "nowhere", "empty": tmp_path / "empty", "its own output": pruned}[source]
    output = pruned if source == "its own output" else tmp_path / "out"
    before = files(pruned)
    status, _, err = run("export", name, "--to", "gguf", "--output", output, "--quiet")
    said = {"nowhere": "Cannot find", "empty": "holds no model", "its own output": "would replace the model"}[source]
    assert status == 2
    assert said in err
    assert err.count("\n") == 1
    assert files(tmp_path) == {"empty"}
    assert files(pruned) == before


def test_a_tolerance_that_is_not_met(run, pruned, tmp_path):
    """A failure of the export, not a mistake: status 1, and nothing is left."""
    words = ["--to", "gguf", "--dtype", "f16", "--tolerance", "1e-9", "--quiet"]
    status, out, err = run("export", pruned, "--output", tmp_path / "out", *words)
    assert (status, out) == (1, "")
    assert "The gguf export differs from the PyTorch model by" in err
    assert not files(tmp_path)


def optimum_cli(*words: object) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "optimum-cli", "export", "selfpruned", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_optimum_cli(pruned, tmp_path):
    done = optimum_cli(pruned, "--to", "gguf", "--dtype", "f16", "--quiet", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'out'}: logits within")
    assert read_export(tmp_path / "out", "gguf").options["dtype"] == "f16"
    wrong = optimum_cli(pruned, "--to", "onyx", tmp_path / "other")
    assert wrong.returncode == 2
    assert wrong.stderr.endswith("selfpruner: Unknown format 'onyx'. Choose onnx, tensorrt, openvino, gguf.\n")
    assert files(tmp_path) == {"out"}


@pytest.mark.slow
def test_optimum_cli_helps_and_starts_without_torch():
    assert "MODEL --to FORMAT [OPTION ...] OUT" in optimum_cli("--help").stdout
    nothing = optimum_cli()
    assert nothing.returncode == 2
    assert "it takes a model, and last an output directory" in nothing.stderr
    code = (
        "import sys\nfrom optimum.commands.optimum_cli import main\nsys.argv = ['optimum-cli', 'export', '--help']\n"
        "try:\n    main()\nexcept SystemExit:\n    assert 'torch' not in sys.modules"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "selfpruned" in shown
