"""Which engine the Space runs: that of the export that was published, else PyTorch. All write the same text."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import torch
from support.tiny import tiny_model
from support.trained import VOCABULARY, trained_tokenizer

from exporters.export import export
from selfpruner_hub import AutoPruner

pytestmark = pytest.mark.heavy
PROMPT = "a b c d"


@pytest.fixture(scope="module")
def model(saved_graphs, tmp_path_factory):
    """A model with its graphs, and with a GGUF file in float32, which decides between near tokens as PyTorch does."""
    pytest.importorskip("xllamacpp", reason='needs pip install -e ".[gguf]"')
    model = shutil.copytree(saved_graphs / "model", tmp_path_factory.mktemp("engines") / "model")
    export(model, "gguf", model / "gguf", dtype="f32")
    return model


@pytest.fixture(scope="module")
def graphs(model):
    """Its graphs for ONNX Runtime GenAI and Transformers.js, which the Space runs too."""
    return model / "onnx"


@pytest.fixture
def published(space, model, saved_graphs, monkeypatch):
    """The Space's modules, for that model and its GGUF file."""
    monkeypatch.setenv("PRUNED_MODEL", str(model))
    monkeypatch.setenv("DENSE_MODEL", str(saved_graphs / "dense"))
    monkeypatch.setenv("PRUNED_GGUF", "gguf/model-f32.gguf")
    return space


@pytest.fixture
def with_graphs(published, graphs, monkeypatch):
    """The same for its graphs."""
    monkeypatch.delenv("PRUNED_GGUF")
    monkeypatch.setenv("PRUNED_GRAPHS", str(graphs))
    return published


def greedy_text(published, which):
    """The text of 12 tokens that PyTorch writes."""
    pytorch, pieces = published("engines.pytorch").load(which), []
    ids = published("tokens").encode_prompt(pytorch.tokenizer, PROMPT)["input_ids"][0].tolist()
    pytorch.write(ids, 12, lambda *piece: pieces.append(piece) or False)
    assert pieces[-1][1] == 12
    return "".join(text for text, _ in pieces)


@pytest.mark.parametrize(
    ("modules", "runtime"),
    [("published", "llama.cpp, f32, 1 thread"), ("with_graphs", "ONNX Runtime, float32, 1 thread")],
)
def test_both_engines_write_the_same_text(modules, runtime, request, tmp_path, monkeypatch):
    """The parent is converted once, and nothing is left of that."""
    published = request.getfixturevalue(modules)
    answers, engines = published("answers"), published("engines")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for which in ("pruned", "dense"):
        seen = [(a.text, a.tokens, a.runtime, a.done) for a in answers.answer(which, PROMPT, 12)]
        assert seen[-1][2:] == (runtime, True)
        assert len(seen) > 6  # a stream
        # llama.cpp holds back the bytes of a character that has not ended; in PyTorch they are shown as one mark.
        assert seen[-1][0].rstrip("\ufffd") == greedy_text(published, which).rstrip("\ufffd")
        assert seen[-1][1] == 12
    assert engines.why_pytorch() == ""
    assert list(tmp_path.iterdir()) == []
    (verdict,) = list(published("app").compare(PROMPT, 4))[-1][-1:]
    assert "PyTorch" not in verdict


def test_a_uniform_model_is_shown_as_others_are(space, tmp_path, monkeypatch):
    """It is a stock model: the file is that of a dense one, and no remote code is there."""
    pytest.importorskip("xllamacpp", reason='needs pip install -e ".[gguf]"')
    dense, tokenizer = tiny_model("llama", vocab_size=VOCABULARY, num_hidden_layers=2), trained_tokenizer()
    for part in (dense, tokenizer):
        part.save_pretrained(tmp_path / "dense")
    AutoPruner(dense, tokenizer, "tests/llama").prune(
        0.2, uniform=True, data="self", window=32, calibration_tokens=1024, fitness_tokens=256, progress=False
    ).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", "gguf", tmp_path / "model" / "gguf", dtype="f32")
    monkeypatch.setenv("PRUNED_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("DENSE_MODEL", str(tmp_path / "dense"))
    monkeypatch.setenv("PRUNED_GGUF", "gguf/model-f32.gguf")
    for which in ("pruned", "dense"):
        *_, last = space("answers").answer(which, PROMPT, 12)
        assert (last.text, last.runtime) == (greedy_text(space, which), "llama.cpp, f32, 1 thread")


@pytest.fixture
def alone(published, monkeypatch):
    """The same with the pruned model alone in llama.cpp, which saves the conversion of the parent."""
    engine = published("engines.llama_cpp").LlamaCppEngine(
        published("model_source").shown().file("gguf/model-f32.gguf")
    )
    monkeypatch.setattr(published("engines"), "_exported", lambda: ({"pruned": engine}, ""))
    return published("answers"), engine


def test_a_visitor_who_leaves_stops_llama_cpp(alone, monkeypatch):
    (answers, engine), counts = alone, []
    write = engine.write

    def watched(told):
        def tell(text, count):
            counts.append(count)
            time.sleep(0.02)  # on a busy machine, a tiny model has written all before the visitor leaves
            return told(text, count)

        return tell

    monkeypatch.setattr(engine, "write", lambda ids, tokens, told: write(ids, tokens, watched(told)))
    answer = answers.answer("pruned", PROMPT, 100)
    next(answer)
    next(answer)
    answer.close()
    with answers._writing:  # the thread that writes has ended
        assert 0 < counts[-1] < 100


def test_the_prompt_and_the_answer_fit_into_the_context(alone):
    answers, engine = alone
    assert engine.longest == 128
    *_, last = answers.answer("pruned", "a" * 120, 100)
    assert last.tokens <= 8
    with pytest.raises(answers.UnavailableError, match="longer than the model can read"):
        list(answers.answer("pruned", "a" * 128, 8))


def in_pytorch(space, why):
    """Both models answer in PyTorch, and the page says why."""
    *_, (pruned, took, dense, dense_took, verdict) = space("app").compare(PROMPT, 4)
    assert pruned
    assert dense
    for said in (took, dense_took):
        assert "PyTorch" in said
    assert verdict.endswith(f" Both models run in PyTorch, not in the export that was published. {why}")


def test_without_xllamacpp(published, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    in_pytorch(published, "llama.cpp is not installed here.")


@pytest.mark.parametrize("size", [0, 5000])
def test_a_damaged_file(size, published, model, tmp_path, monkeypatch, caplog):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    path = damaged / "gguf" / "model-f32.gguf"
    path.write_bytes(path.read_bytes()[:size])
    monkeypatch.setenv("PRUNED_MODEL", str(damaged))
    in_pytorch(published, "The published GGUF file cannot be loaded.")
    assert "the export is not used: " in caplog.text  # for the owner


def test_a_file_that_is_not_there(published, monkeypatch):
    monkeypatch.setenv("PRUNED_GGUF", "gguf/model-q8_0.gguf")
    in_pytorch(published, "The published GGUF file cannot be loaded.")


def test_a_parent_that_cannot_be_converted(published, tmp_path, monkeypatch):
    tiny_model("gemma", vocab_size=VOCABULARY).save_pretrained(tmp_path)
    trained_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setenv("DENSE_MODEL", str(tmp_path))
    in_pytorch(published, "The dense model cannot be converted to GGUF here.")


@pytest.mark.parametrize(
    ("modules", "form", "copies"),
    [("published", "GGUF", 1), ("with_graphs", "ONNX", 2)],
)
def test_a_parent_that_is_too_large_to_convert(modules, form, copies, request, monkeypatch):
    published = request.getfixturevalue(modules)
    engine = published("engines.base")
    needed = copies * 4 * published("model_source").record()["parameters"]["dense"] * engine.GROWTH
    monkeypatch.setattr(engine, "memory_left", lambda: needed - 1)
    said = f"For a conversion to {form}, the dense model is too large for this machine: it needs about"
    assert published("engines").why_pytorch().startswith(said)


@pytest.mark.parametrize("library", ["onnxruntime", "onnxscript"])
def test_without_onnx_runtime(library, with_graphs, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    in_pytorch(with_graphs, "ONNX Runtime is not installed here.")


@pytest.mark.parametrize("name", ["config.json", "onnx/model.onnx", "onnx/model.onnx_data"])
def test_a_damaged_graph(name, with_graphs, graphs, tmp_path, monkeypatch):
    damaged = shutil.copytree(graphs, tmp_path / "damaged")
    (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
    monkeypatch.setenv("PRUNED_GRAPHS", str(damaged))
    in_pytorch(with_graphs, "The published ONNX graph cannot be loaded.")


def test_graphs_of_another_kind(with_graphs, graphs, tmp_path, monkeypatch):
    """Without GenAI's file they are none of this layout."""
    other = shutil.copytree(graphs, tmp_path / "other")
    (other / "genai_config.json").unlink()
    monkeypatch.setenv("PRUNED_GRAPHS", str(other))
    in_pytorch(with_graphs, "The published ONNX graph cannot be loaded.")


def test_only_the_graph_in_float32_is_downloaded(with_graphs, graphs, monkeypatch):
    """A repository has graphs in other dtypes, and those of the parent, too."""
    asked = {}
    module = with_graphs("engines.onnx_runtime")
    monkeypatch.setattr(module, "snapshot_download", lambda *name, **given: asked.update(given) or str(graphs))
    monkeypatch.setenv("PRUNED_GRAPHS", "me/first-ONNX")
    monkeypatch.setenv("PRUNED_REVISION", "trial")
    assert set(with_graphs("engines.onnx_runtime").load("me/first-ONNX")) == {"pruned", "dense"}
    assert asked["revision"] == "trial"
    assert {name for name in asked["allow_patterns"] if "/" in name} == {"onnx/model.onnx", "onnx/model.onnx_data"}
    for name in asked["allow_patterns"]:
        assert (graphs / name).is_file(), name


def test_a_gpu_keeps_pytorch(published, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert published("engines")._exported() == ({}, "")


def test_the_file_belongs_to_the_model_that_publishing_named(published, model, tmp_path, monkeypatch):
    """A Space's `model.json` names model and file; where the environment names another model, the file is not its."""
    shown = published("model_source")
    written = {"pruned": "me/first", "gguf": "gguf/model-f16.gguf", "graphs": "me/first-ONNX", "revision": "trial"}
    (tmp_path / "model.json").write_text(json.dumps(written))
    monkeypatch.setattr(shown, "__file__", str(tmp_path / "model_source.py"))
    monkeypatch.delenv("PRUNED_GGUF")
    assert (shown.shown().gguf, shown.shown().graphs, shown.shown().revision) == (None, None, None)
    shown.shown.cache_clear()
    monkeypatch.delenv("PRUNED_MODEL")
    monkeypatch.delenv("DENSE_MODEL")
    assert vars(shown.shown()) == {**written, "dense": None}
