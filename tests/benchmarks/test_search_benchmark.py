"""A long search beside none: equal starts, every plan repaired once, differences from the best start, stops."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import search as benchmark
from protocol import Chat, Rows, Unseen
from support.chatting import chat_tokenizer
from support.tiny import tiny_model

from selfpruner_hub.evaluation import chat as conversations
from selfpruner_hub.evaluation.questions import load_questions
from selfpruner_hub.settings import PruneSettings


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script on a tiny model."""
    for part in (tiny_model("llama", max_position_embeddings=1024), chat_tokenizer()):
        part.save_pretrained(tmp_path / "embedded")
    monkeypatch.setattr(benchmark, "embedded_model", lambda: {"name": str(tmp_path / "embedded")})
    monkeypatch.setattr(benchmark, "PruneSettings", partial(PruneSettings, seeds=("uniform",)))  # there is much to find
    monkeypatch.setattr(Unseen, "COUNTS", {512: 3})
    monkeypatch.setattr("protocol.load_questions", lambda half: load_questions(half)[:2])
    monkeypatch.setattr(conversations.ChatMeasure.__init__, "__defaults__", (2, conversations.SEED, None))
    monkeypatch.setattr(Chat, "WINDOW", 64)
    monkeypatch.setattr(Chat, "COUNT", 2)
    texts = [tmp_path / name for name in ("search.txt", "unseen.txt")]
    for seed, path in enumerate(texts):
        letters = np.random.default_rng(seed).choice(list("abcdefgh "), 12_000)
        path.write_text("\n".join("".join(letters)[at : at + 600] for at in range(0, 12_000, 600)))

    def run(*words):
        fixed = ["--betas", "0.3", "--tokens", "2048", "--evaluations", "8", "--output", tmp_path]
        benchmark.main([str(word) for word in (tmp_path / "work", *texts, *fixed, *words)])
        return json.loads((tmp_path / "search.json").read_text())["results"]

    return run


def test_a_search_is_measured_beside_the_best_start(run, tmp_path, capsys):
    control, searched = run("--methods", "evolution")
    assert (control["method"], searched["method"]) == ("no search", "evolution")
    assert control["best_from"].startswith("seed:")
    assert searched["selected"] < control["selected"]
    assert searched["evaluations"] == searched["curve"][-1][0] >= 8
    kept = {row["method"]: np.array(row["kl_by_window"]) for row in Rows(tmp_path / "work" / "rows.jsonl")}
    gaps = kept["evolution"] - kept["no search"]
    assert gaps.any()
    assert searched["difference"] == pytest.approx(gaps.mean(), abs=1e-4)
    assert searched["kl_articles"] - control["kl_articles"] == pytest.approx(gaps.mean(), abs=2e-4)
    assert set(Chat.NAMES) < set(searched)
    capsys.readouterr()

    rows = run("--methods", "evolution", "random")  # what was measured is measured once
    assert [row["method"] for row in rows] == ["no search", "evolution", "random"]
    assert rows[:2] == [control, searched]
    capsys.readouterr()
    assert run("--methods", "evolution", "random") == rows
    assert "repairing" not in capsys.readouterr().out
