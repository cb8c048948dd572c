"""The demo on a tiny chat model: what it says from beginning to end."""

from __future__ import annotations

import pytest
from support.chatting import chat_tokenizer
from support.tiny import tiny_model

from selfpruner_hub.cli import demo
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner


@pytest.fixture
def said(monkeypatch):
    """Run it, and give back what was said."""
    tiny = AutoPruner(tiny_model("llama", max_position_embeddings=1024), chat_tokenizer(), demo.NAME)
    few = {"window": 32, "calibration_tokens": 512, "fisher_tokens": 128, "fitness_tokens": 128}
    monkeypatch.setattr(demo, "load_embedded", lambda: tiny)
    monkeypatch.setattr(demo, "SETTINGS", {**demo.SETTINGS, **few})
    monkeypatch.setattr(demo, "SEARCH", {"evaluations": 0})
    monkeypatch.setattr(demo, "CONVERSATIONS", 4)

    def run(*arguments):
        lines = []
        demo.run(lines.append, *arguments, progress=False)
        return "\n".join(lines)

    return run


def test_what_it_says(said):
    text = said(0.3)
    order = ["Loading", "Searching", "Saved (", "Measuring", "agreement", "dense ", "pruned ", "other conversations"]
    order += [demo.QUESTIONS[0], "dense:", "pruned:", *demo.QUESTIONS[1:], "The best plan", "What to try next:"]
    place = -1
    for each in order:
        place = text.index(each, place + 1)
    assert "--output smollm2-pruned" in text


def test_what_it_keeps(said, tmp_path):
    text = said(0.4, tmp_path / "kept")
    assert f"reloaded from {tmp_path / 'kept'}" in text
    assert f"selfpruner demo {tmp_path / 'kept'} " in text
    report = PrunedModel.from_pretrained(tmp_path / "kept").report
    assert report.beta == 0.4
    assert report.data["calibration"]["name"] == "chat and self"
