"""Divergence and agreement on conversations: none and all for the model itself, more and less for a damaged one."""

import copy
from dataclasses import replace

import pytest
import torch
from support.chat import chat_tokenizer
from support.tiny import tiny_model
from torch import nn

from selfpruner_hub.calibration.conversations import CHAT, Conversation
from selfpruner_hub.errors import DataError
from selfpruner_hub.evaluation import chat
from selfpruner_hub.evaluation.chat import ChatMeasure, padded
from selfpruner_hub.evaluation.metrics import following

TOKENIZER = chat_tokenizer()
END = TOKENIZER.eos_token_id


def talking_model():
    """A tiny model that writes letters and, now and then, the end of a turn: what it says is read as it was written."""
    model = tiny_model("llama")
    head = nn.Linear(32, 128)
    head.weight.data = model.lm_head.weight.data
    head.bias.data.fill_(-1e4)
    head.bias.data[33:127] = 0
    head.bias.data[END] = 1.5
    model.lm_head = head
    return model


@pytest.fixture(scope="module")
def dense():
    return talking_model()


@pytest.fixture
def measure(dense, monkeypatch):
    monkeypatch.setattr(chat, "CHAT", replace(CHAT, answer_tokens=24))
    return ChatMeasure(dense, TOKENIZER, count=8, seed=5)


def test_the_dense_model_agrees_with_itself(dense, measure):
    figures = measure(dense)
    assert figures.agreement >= 0.99
    assert figures.kl == pytest.approx(0, abs=1e-4)


def test_answers_are_long_enough_to_measure(measure):
    assert measure.conversations == 8
    assert 8 * 2 < measure.tokens <= 8 * 25


def test_a_damaged_model_agrees_less_and_diverges_more(dense, measure):
    figures = []
    for damage in (0.02, 0.2):
        damaged = copy.deepcopy(dense)
        torch.manual_seed(0)
        for layer in damaged.model.layers:
            layer.mlp.down_proj.weight.data += damage * torch.randn_like(layer.mlp.down_proj.weight)
        figures.append(measure(damaged))
    slight, grave = figures
    assert 0 <= grave.agreement < slight.agreement < 1.0 or grave.agreement < slight.agreement == 1.0
    assert 0 < slight.kl < grave.kl
    assert grave.agreement < 0.8


def test_the_seed_decides_the_conversations(dense, measure):
    same, other = (ChatMeasure(dense, TOKENIZER, count=8, seed=seed) for seed in (5, 6))
    assert torch.equal(same._windows, measure._windows)
    assert not torch.equal(other._windows[0], measure._windows[0])


def test_progress_tells_the_writing(dense, monkeypatch):
    monkeypatch.setattr(chat, "CHAT", replace(CHAT, answer_tokens=4))
    told = []
    ChatMeasure(dense, TOKENIZER, count=2, progress=lambda *what: told.append(what))
    assert {what for what, *_ in told} == {"writing questions", "writing answers"}


def test_answers_that_are_all_empty(dense, monkeypatch):
    monkeypatch.setattr(chat, "write_conversations", lambda *_, **__: [])
    with pytest.raises(DataError, match="answers are empty.*--no-chat"):
        ChatMeasure(dense, TOKENIZER)


def test_padded_conversations_count_the_assistants_tokens():
    talks = [
        Conversation((5, 9, 9, 7, 4), (False, False, False, True, True)),
        Conversation((5, 9, 6, 8, 4, 10), (False, True, True, True, True, False)),
        Conversation((5, 6), (True, True)),
    ]
    windows, counted = padded(talks)
    assert windows.shape == (3, 6)
    assert counted.shape == (3, 5)
    for row, talk in zip(windows, talks, strict=True):
        assert row[: len(talk.ids)].tolist() == list(talk.ids)
    assert following(windows, counted).tolist() == [7, 4, 9, 6, 8, 4, 6]  # nothing predicts the first token of all
