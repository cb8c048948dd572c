"""The demo on a tiny chat model: what it says from beginning to end."""

from __future__ import annotations

import re
import sys
from subprocess import CompletedProcess

import pytest
from support.chatting import TEMPLATE
from support.tiny import tiny_model
from support.trained import VOCABULARY, trained_tokenizer

from selfpruner_hub.cli import demo
from selfpruner_hub.hub.card import WEIGHTS_OF_GRAPHS
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, ExportRecord
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE


@pytest.fixture
def said(monkeypatch, tmp_path):
    """Run it, and give back what was said."""
    model, tokenizer = tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=1024), trained_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model.generation_config.eos_token_id = list(range(2, VOCABULARY, 10))  # random weights end their turns too
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "embedded")
    few = {"window": 32, "calibration_tokens": 512, "fisher_tokens": 128, "fitness_tokens": 128}
    tiny = {"name": str(tmp_path / "embedded"), "base_model": demo.EMBEDDED_MODEL}
    monkeypatch.setattr(demo, "embedded_model", lambda: tiny)
    monkeypatch.setattr(demo, "DEMO_SETTINGS", {**demo.DEMO_SETTINGS, **few})
    monkeypatch.setattr(demo, "SHORT_SEARCH", {"evaluations": 0})
    monkeypatch.setattr(demo, "DEMO_CONVERSATIONS", 4)
    monkeypatch.setattr(demo, "DEMO_RECOVERY", {"data": "chat", "tokens": 512, "window": 32, "batch_tokens": 128})

    def run(*arguments):
        lines = []
        demo.run_demo(lines.append, *arguments, progress=False)
        return "\n".join(lines)

    return run


def test_what_it_says(said):
    text = said(0.3)
    order = [
        "Loading",
        "Searching",
        "Training it",
        "Saved (",
        "Measuring",
        "agreement",
        "dense ",
        "pruned ",
        "other conversations",
    ]
    first, *others = demo.DEMO_QUESTIONS
    order += ["llama.cpp, a request of 128 + 32 tokens", first, "dense:", "pruned:", *others]
    order += ["The best plan", "What to try next:"]
    place = -1
    for each in order:
        place = text.index(each, place + 1)
    assert "--output smollm2-pruned" in text
    assert re.search(r"float16: dense \d+ ms, pruned \d+ ms, \d\.\d\d×", text)


def test_what_it_says_without_llama_cpp(said, monkeypatch):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert "in float16: not timed. " in (text := said(0.3))
    assert "What to try next:" in text


def test_what_it_keeps(said, tmp_path):
    text = said(0.4, tmp_path / "kept")
    assert f"reloaded from {tmp_path / 'kept'}" in text
    assert f"selfpruner demo {tmp_path / 'kept'} " in text
    assert (picture := tmp_path / "kept" / "plots" / "rates.png").stat().st_size > 10_000
    assert f"from each layer: {picture}" in text
    report = PrunedModel.from_pretrained(tmp_path / "kept").report
    assert report.beta == 0.4
    assert report.data["calibration"]["name"] == "chat"


@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize(
    ("form", "options", "name", "variable"),
    [
        ("gguf", {"dtype": "f16", "tokenizer_from": None}, "model-f16.gguf", "PRUNED_GGUF"),
        ("onnx", {"layout": "hub"}, "config.json", "PRUNED_GRAPHS"),
        ("onnx", {"layout": "transformers", "dtype": "float32", "fusions": "cpu"}, "config.json", None),
    ],
)
def test_a_model_that_was_exported_is_opened_in_its_engine(
    form, options, name, variable, other, saved_models, saved_model, monkeypatch
):
    """Not in an export of another model, which an earlier one may have left there."""
    source = {"name": "", **identity_of(load_model(str(saved_model))[0])}
    record = ExportRecord(form, options, source, {}, 0.1, 0.0, "", "")
    (saved_model / form).mkdir()
    (saved_model / form / EXPORT_RECORD_FILE).write_text(record.to_json())
    (saved_model / form / name).touch()
    if options.get("layout") == "hub":
        for graph in (f"onnx/model{suffix}.onnx{data}" for suffix in WEIGHTS_OF_GRAPHS for data in ("", "_data")):
            (saved_model / form / graph).parent.mkdir(exist_ok=True)
            (saved_model / form / graph).touch()
    made_from = saved_models / ("second" if other else "first") / MODEL_RECORD_FILE
    (saved_model / form / MODEL_RECORD_FILE).write_text(made_from.read_text())
    variables = {"PRUNED_GGUF": f"gguf/{name}", "PRUNED_GRAPHS": str(saved_model / "onnx")}
    for each in variables:
        monkeypatch.delenv(each, raising=False)
    started = []
    monkeypatch.setattr(demo.subprocess, "run", lambda app, env, check: started.append(env) or CompletedProcess(app, 0))
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: object())
    demo.open_space(str(saved_model))
    (environment,) = started
    assert environment["PRUNED_MODEL"] == str(saved_model)
    found = {each: environment[each] for each in variables if each in environment}
    assert found == ({} if other or variable is None else {variable: variables[variable]})
