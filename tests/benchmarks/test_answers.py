"""Answers of models beside those of a base, question by question, on tiny models."""

from __future__ import annotations

import json

import answers
import pytest
import torch
from protocol import Chat
from support.chatting import chat_tokenizer, save_chat
from support.tiny import tiny_model

from selfpruner_hub.calibration.chat_template import prompt_ids
from selfpruner_hub.evaluation import chat as conversations
from selfpruner_hub.evaluation.questions import PlainQuestion, load_questions


def test_a_reply_has_the_probability_of_its_tokens():
    model, tokenizer = tiny_model("llama", max_position_embeddings=1024), chat_tokenizer()
    prompt = prompt_ids(tokenizer, [{"role": "user", "content": "Why?"}])
    total, ids = 0.0, list(prompt)
    for token in tokenizer("So.", add_special_tokens=False).input_ids:
        with torch.no_grad():
            total += float(model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token])
        ids.append(token)
    assert len(ids) > len(prompt) + 1
    assert answers.log_probability(model, tokenizer, "Why?", "So.") == pytest.approx(total, abs=1e-4)


def test_models_are_compared_with_the_base_question_by_question(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("protocol.load_questions", lambda half: load_questions(half)[:6])
    monkeypatch.setattr(PlainQuestion, "is_right", lambda _, reply: sum(map(ord, reply)) % 3 > 0)
    monkeypatch.setattr(conversations.ChatMeasure.__init__, "__defaults__", (4, conversations.SEED, None))
    monkeypatch.setattr(Chat, "WINDOW", 64)
    monkeypatch.setattr(Chat, "COUNT", 4)
    models = [str(save_chat(tmp_path / f"m{seed}", seed)) for seed in range(3)]
    answers.main([str(tmp_path / "work"), *models])
    lines = capsys.readouterr().out.splitlines()
    rows = {
        row["model"]: row for row in map(json.loads, (tmp_path / "work" / "answers.jsonl").read_text().splitlines())
    }
    assert set(rows["m0"]["first"]) == {1.0}  # only what the parent answers is asked
    assert rows["m0"]["kl_chat"] < 1e-3 < rows["m2"]["kl_chat"]
    mean = {name: sum(row["reply"]) / len(row["reply"]) for name, row in rows.items()}
    assert mean["m0"] > mean["m2"]
    base, other = ([cell.strip() for cell in line.strip("| ").split("|")] for line in lines[-2:])
    assert (base[0], other[0]) == ("m1", "m2")
    assert base[3] == f"{mean['m1']:.3f}"
    assert other[3].startswith(f"{mean['m2']:.3f}, {mean['m2'] - mean['m1']:+.3f} ± ")
    monkeypatch.setattr(answers, "answers", None)  # a second call measures nothing again
    answers.main([str(tmp_path / "work"), *models])
    assert capsys.readouterr().out.splitlines()[-2:] == lines[-2:]
