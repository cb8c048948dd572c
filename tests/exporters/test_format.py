"""The registry of formats: what one entry is enough for, and what it costs to read."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.tiny import save_tiny

from exporters.benchmark.report import BenchmarkReport
from exporters.format import FORMATS, ExportFormat, runtimes
from selfpruner_hub.cli import main
from selfpruner_hub.hub.bundle import collect, is_ours
from selfpruner_hub.hub.exports import make_exports
from selfpruner_hub.storage.export_record import read_export
from selfpruner_hub.storage.layout import EXPORTS

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "gguf", "onnxruntime", "openvino", "xllamacpp", "tensorrt", "vllm"}
ELSEWHERE = {"torch", "onnx", "gguf"}
"""Formats that more is made of than an export: PyTorch is the source; graphs and GGUF files are published and shown."""


@pytest.fixture
def toy(monkeypatch):
    """The format of `support/toy_format.py`, registered: all that it takes."""
    monkeypatch.setitem(EXPORTS, "toy", "support.toy_format")


def help_of(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("toy")
def test_a_format_is_a_choice_of_the_command_line(capsys):
    told = help_of("export", capsys)
    assert "--to FORMAT onnx, tensorrt, openvino, gguf or toy" in told
    assert "--bricks N toy: how many" in told
    assert "openvino, gguf, toy, genai or vllm" in help_of("benchmark", capsys)


@pytest.mark.usefixtures("toy")
def test_a_format_is_exported_and_verified(tmp_path, capsys):
    save_tiny("llama", tmp_path / "model")
    words = [str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--quiet"]
    assert main(["export", "--to", "toy", "--bricks", "2", *words]) == 0
    record = read_export(tmp_path / "out")
    assert (record.format, record.options) == ("toy", {"bricks": 2})
    assert record.max_difference < 1e-5
    assert main(["export", "--to", "toy", "--dtype", "q4_0", *words]) == 2
    assert "An export to toy has no option 'dtype'. It takes bricks." in capsys.readouterr().err
    verify = ["verify", str(tmp_path / "out"), "--model", str(tmp_path / "model"), "--new-tokens", "3", "--quiet"]
    assert main(verify) == 0
    assert "toy: all 3 tokens are PyTorch's" in capsys.readouterr().out


@pytest.mark.heavy
@pytest.mark.usefixtures("toy", "forked_workers")
def test_a_format_is_timed(tmp_path, capsys):
    save_tiny("llama", tmp_path / "dense")
    save_tiny("llama", tmp_path / "pruned", num_hidden_layers=1)
    words = ["--runtime", "toy", "--prompt", "4", "--new", "1", "--runs", "2", "--threads", "1", "--quiet", "--json"]
    assert main(["benchmark", str(tmp_path / "pruned"), "--against", str(tmp_path / "dense"), *words]) == 0
    found = BenchmarkReport.from_json(capsys.readouterr().out, "stdout")
    assert (found.runtime, found.dtype) == ("toy", "float32")
    assert found.cases[0].decode.pruned.median > 0


@pytest.mark.heavy
@pytest.mark.usefixtures("toy")
def test_a_format_is_published(saved_model):
    make_exports(saved_model, ["toy"])
    assert "toy/toy/model.safetensors" in collect(saved_model).files
    assert is_ours("toy/toy/model.safetensors")


@pytest.mark.parametrize("name", FORMATS)
def test_an_entry_is_what_it_says(name):
    found, extras = FORMATS[name], tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert found.name == name
    assert found.title
    assert not found.extra or found.extra in extras["optional-dependencies"]
    assert isinstance(found, ExportFormat) == (name in EXPORTS)
    assert found.runs == bool(found.dtypes())
    assert found.export_format in ("", *EXPORTS)


@pytest.mark.parametrize("name", EXPORTS)
def test_the_options_of_a_format_are_keywords_of_its_writer(name):
    writer = importlib.import_module(f"{EXPORTS[name]}.writer").write
    keywords = inspect.signature(writer).parameters.values()
    assert [option.name for option in FORMATS[name].options] == [k.name for k in keywords if k.kind is k.KEYWORD_ONLY]


def test_a_format_that_could_not_be_compared_is_refused():
    with pytest.raises(TypeError, match="files"):
        ExportFormat("toy", title="Toy", write=print)


def test_the_registry_imports_no_library():
    code = "import sys\nfrom exporters.format import FORMATS\nlist(FORMATS.values())\nprint(*sys.modules)"
    modules = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert "exporters.to_gguf" in modules
    assert not HEAVY & modules


def test_only_the_registry_and_its_folder_name_a_format():
    """A table elsewhere that is keyed by names of formats would be another place to touch."""
    found = {}
    for path in (path for top in ("exporters", "selfpruner_hub") for path in (ROOT / top).rglob("*.py")):
        own = {name for name, package in (*EXPORTS.items(), *((n, f"exporters.{n}") for n in runtimes())) if
               path.is_relative_to(ROOT / package.replace(".", "/"))}  # fmt: skip
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in FORMATS.keys() - ELSEWHERE - own:
                found.setdefault(node.value, set()).add(path.relative_to(ROOT).as_posix())
    registry = {
        name: "selfpruner_hub/storage/layout.py" if name in EXPORTS else "exporters/format.py" for name in found
    }
    assert found == {name: {place} for name, place in registry.items()}
    assert found.keys() == FORMATS.keys() - ELSEWHERE
