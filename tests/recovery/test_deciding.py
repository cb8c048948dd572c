"""What decides whether a recovery is kept: plain questions that the parent answers."""

from __future__ import annotations

import pytest
from support.chatting import chat_tokenizer
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.evaluation.questions import PlainQuestion, load_questions
from selfpruner_hub.recovery import deciding
from selfpruner_hub.recovery.deciding import PlainQuestions, answers_fewer, grade

PARENT = tiny_model("llama", max_position_embeddings=1024)


@pytest.mark.parametrize(
    ("lost", "won", "fewer"),
    [(0, 0, False), (4, 0, False), (5, 0, True), (0, 9, False), (20, 11, False), (26, 12, True)],
)
def test_fewer_answers_count_beyond_their_error(lost, won, fewer):
    before = [True] * lost + [False] * won + [True, False] * 20
    after = [False] * lost + [True] * won + [True, False] * 20
    assert answers_fewer(before, after) is fewer


def test_a_state_that_would_be_refused_comes_behind_one_that_would_be_taken():
    before = [1.0, 2.0, 4.0]
    taken, refused, worse = ([0.95, 1.9, 3.8], [0.8, 1.6, 4.2], [2.0, 4.0, 8.0])
    assert grade(before, taken, 2) == pytest.approx(0.95)
    assert grade(before, taken, 2) < grade(before, refused, 2) < grade(before, worse, 2)


def test_only_what_the_parent_answers_is_asked(monkeypatch):
    all_of_them = load_questions("develop")
    known = {each.question for each in all_of_them[::7]}
    asked = []

    def answered(model, _tokenizer, questions, _progress):
        asked.append((model, questions))
        return [each.question in known for each in questions]

    monkeypatch.setattr(deciding, "rightly_answered", answered)
    questions = PlainQuestions(PARENT, chat_tokenizer(), None)
    assert asked == [(PARENT, all_of_them)]
    other = tiny_model("llama", seed=1, max_position_embeddings=1024)
    assert questions(other) == [True] * len(known)
    assert asked[1] == (other, all_of_them[::7])


def test_replies_are_judged(monkeypatch):
    monkeypatch.setattr(deciding, "load_questions", lambda half: load_questions(half)[:6])
    monkeypatch.setattr(PlainQuestion, "is_right", lambda _, reply: sum(map(ord, reply)) % 3 > 0)
    questions = PlainQuestions(PARENT, chat_tokenizer(), None)
    assert set(questions(PARENT)) == {True}
    assert len(questions(tiny_model("llama", seed=1, max_position_embeddings=1024))) == len(questions(PARENT))


@pytest.mark.parametrize("tokenizer", [None, tiny_tokenizer()])
def test_a_base_model_is_asked_nothing(tokenizer, monkeypatch):
    monkeypatch.setattr(deciding, "rightly_answered", None)
    assert PlainQuestions(PARENT, tokenizer, None)(PARENT) == []
