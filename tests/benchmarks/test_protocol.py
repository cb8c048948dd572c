"""What the benchmarks share."""

from __future__ import annotations

import pytest
from protocol import Chat, Rows, Unseen
from support.chatting import chat_tokenizer
from support.tiny import tiny_model

from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.evaluation import chat as conversations
from selfpruner_hub.evaluation.questions import load_questions


def test_rows_are_there_again(tmp_path):
    file = tmp_path / "work" / "rows.jsonl"
    rows = Rows(file)
    assert rows == []
    rows.keep({"runtime": "onnx", "beta": 0.3})
    again = Rows(file)
    assert again == rows == [{"runtime": "onnx", "beta": 0.3}]
    assert again.have(runtime="onnx")
    assert not again.have(runtime="onnx", beta=0.5)


def test_the_spread_windows_are_of_the_whole_text(tmp_path, monkeypatch):
    monkeypatch.setattr(Unseen, "COUNTS", {16: 2, 32: 1})
    monkeypatch.setattr(Unseen, "WIDTH", 16)
    monkeypatch.setattr(Unseen, "SPREAD", 4)
    (tmp_path / "text.txt").write_text(" ".join(f"word{number}" for number in range(200)))
    unseen = Unseen(str(tmp_path / "text.txt"), chat_tokenizer())
    whole = consecutive_windows(str(tmp_path / "text.txt"), chat_tokenizer(), 16).windows
    places = [next(i for i, window in enumerate(whole) if window.equal(own)) for own in unseen.spread]
    assert places == [number * len(whole) // 4 for number in range(4)]
    assert places[-1] > len(whole) // 2
    assert unseen.windows[16].equal(whole[:2])
    found = unseen.perplexities(tiny_model("llama"))
    assert list(found) == list(Unseen.NAMES)
    assert all(value > 1 for value in found.values())


def test_what_is_left_of_chat(tmp_path, monkeypatch):
    few = {half: load_questions(half)[:4] for half in ("develop", "report")}
    monkeypatch.setattr("protocol.load_questions", few.__getitem__)
    monkeypatch.setattr(conversations.ChatMeasure.__init__, "__defaults__", (4, conversations.SEED, None))
    monkeypatch.setattr(Chat, "WINDOW", 64)
    monkeypatch.setattr(Chat, "COUNT", 4)
    dense = tiny_model("llama", max_position_embeddings=1024)
    chat = Chat(dense, chat_tokenizer(), tmp_path / "work")
    same, other = chat.figures(dense), chat.figures(tiny_model("llama", seed=1, max_position_embeddings=1024))
    assert set(same) == set(other) == set(Chat.NAMES)
    assert (same["kl_chat"], same["kl_code"], same["kept"]) == pytest.approx((0, 0, 1), abs=1e-3)
    assert other["kl_chat"] > 0 < other["kl_code"]
    assert "4 conversations" in chat.words
    assert "half 'report'" in chat.words
    assert (tmp_path / "work" / "code.txt").stat().st_size > 10_000
