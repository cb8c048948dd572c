"""Own widths beside one width, end to end on a tiny model: cut, recovered, measured, timed, and taken up again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import uniform
from defaults import Begun
from protocol import Rows
from support.chat import chat_tokenizer
from support.tiny import tiny_model

from selfpruner_hub import AutoPruner, PrunedModel, settings
from selfpruner_hub.models.architectures import is_stock
from selfpruner_hub.recovery import texts

SMALL = {"window": 32, "calibration_tokens": 1024, "fisher_tokens": 256, "fitness_tokens": 256, "multiple_of": 1}


@pytest.mark.heavy
@pytest.mark.usefixtures("forked_workers")
def test_both_widths_are_cut_recovered_measured_and_timed_once(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024, num_hidden_layers=2), chat_tokenizer()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "work" / "dense")
    measured = []

    def measure(model):
        measured.append(model)
        return {"perplexity_512": 2.0, "kept": 0.5}

    def begun(work, _unseen):
        pruner = AutoPruner(model, tokenizer, "tests/llama")
        return Begun(Rows(work / "rows.jsonl"), pruner, str(work / "dense"), measure, "by nobody", None)

    monkeypatch.setattr(uniform, "begun", begun)
    monkeypatch.setattr(uniform, "RUNS", (("torch", "float32"), ("vllm", "float32")))
    monkeypatch.setattr(uniform, "SIZES", {"prompts": [8], "new_tokens": 2, "runs": 2})
    monkeypatch.setattr(uniform, "DATA", "")
    monkeypatch.setattr(texts, "DECIDING_WINDOWS", 1)
    monkeypatch.setitem(settings.PRESETS, "default", settings.resolve(None, **SMALL))
    letters = np.random.default_rng(0).choice(list("abcdefgh "), 60_000)
    (tmp_path / "a.txt").write_text("\n".join("".join(letters)[at : at + 600] for at in range(0, 60_000, 600)))
    arguments = [tmp_path / "work", tmp_path / "a.txt", "b.txt", "--betas", "0.3", "--tokens", "8192"]
    arguments = [*map(str, arguments), "--output", str(tmp_path)]
    uniform.main(arguments)
    rows = json.loads((tmp_path / "uniform.json").read_text())["results"]
    assert [(row["beta"], row.get("widths"), row.get("asked_tokens")) for row in rows] == [
        (0.0, None, None), (0.3, "own", 0), (0.3, "own", 8192), (0.3, "uniform", 0), (0.3, "uniform", 8192)
    ]  # fmt: skip
    assert len(measured) == len(rows)
    assert rows[0]["speed"] == {}
    for row in rows[1:]:
        assert row["speed"]["torch:float32:8"]["prefill"] > 0
    stock = [is_stock(PrunedModel.from_pretrained(tmp_path / "work" / f"b30-{w}").model) for w in uniform.WIDTHS]
    assert stock == [False, True]
    capsys.readouterr()
    uniform.main(arguments)
    assert len(measured) == len(rows)
    assert "| 0.3 | uniform |" in capsys.readouterr().out
