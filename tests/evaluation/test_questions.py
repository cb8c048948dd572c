"""Plain questions: two halves without a question in common, fair answers, and how replies are counted."""

import re

import pytest
from support.chat import STYLES, Writer, chat_tokenizer, user
from support.tiny import tiny_model

from selfpruner_hub.calibration.chat_template import prompt_ids
from selfpruner_hub.errors import DataError, UserError
from selfpruner_hub.evaluation import questions
from selfpruner_hub.evaluation.questions import (
    HALVES,
    REPLY_TOKENS,
    PlainQuestion,
    load_questions,
    replies,
    rightly_answered,
)

MODEL = tiny_model("llama")
ALL = {half: load_questions(half) for half in HALVES}
EACH = [question for half in HALVES for question in ALL[half]]


def same(text):
    """Words of a text, in lower case."""
    return " ".join(re.findall(r"\w+", text.lower()))


def test_there_are_200_in_each_half():
    assert {half: len(found) for half, found in ALL.items()} == {"develop": 200, "report": 200}
    assert all(question.half == half for half, found in ALL.items() for question in found)
    assert load_questions() == ALL["report"]


def test_no_question_is_asked_twice():
    assert len({same(question.question) for question in EACH}) == 400


def test_both_halves_are_of_the_same_topics():
    count = {half: [q.topic for q in found] for half, found in ALL.items()}
    assert sorted(count["develop"]) == sorted(count["report"])
    assert len(set(count["report"])) > 10


@pytest.mark.parametrize("question", EACH, ids=lambda question: question.question)
def test_a_question_does_not_give_its_answer_away(question):
    assert question.answers
    assert not question.is_right(question.question)
    assert question.question == question.question.strip()
    assert len({answer.lower() for answer in question.answers}) == len(question.answers)
    for answer in question.answers:
        assert answer == answer.strip() != ""
        assert question.is_right(f"I think that it is {answer}.")


@pytest.mark.parametrize(
    ("answers", "reply", "right"),
    [
        (["Paris"], "The capital of France is Paris.", True),
        (["Paris"], "paris", True),
        (["Paris"], "PARIS!", True),
        (["Paris"], "It is **Paris**, on the Seine.", True),
        (["Paris"], "The Parisians live there.", False),
        (["Paris"], "Comparis", False),
        (["Paris"], "", False),
        (["honey"], "London or honey", True),
        (["cat"], "concatenate", False),
        (["cat", "cats"], "Cats.", True),
        (["7", "seven"], "There are 7 days.", True),
        (["7", "seven"], "There are 70 or 17.", False),
        (["7", "seven"], "Seven-day weeks", True),
        (["Milky Way"], "It is the milky way.", True),
        (["Milky Way"], "Milky chocolate, by the way", False),
        (["H2O"], "Water is h2o", True),
        (["St. Paul"], "St Paul", False),  # a dot is a dot
        (["St. Paul"], "Stx Paul", False),
        (["C++"], "It is written in C++.", True),
    ],
)
def test_a_reply_is_right_by_whole_words_in_any_case(answers, reply, right):
    assert PlainQuestion("report", "topic", "What?", tuple(answers)).is_right(reply) is right


def test_an_unknown_half():
    with pytest.raises(UserError, match="Unknown half 'both'.*develop, report"):
        load_questions("both")


@pytest.mark.parametrize("style", STYLES)
def test_questions_are_asked_through_the_template(style, monkeypatch):
    tokenizer = chat_tokenizer(style)
    writer = Writer(tokenizer, [], lambda number: [" Paris. ", None, "\nHoney\n"][number])
    monkeypatch.setattr(questions, "continuations", writer)
    asked = ["What is the capital of France?", "Why?", "What do bees make?"]
    assert replies(MODEL, tokenizer, asked) == ["Paris.", "x" * REPLY_TOKENS, "Honey"]
    (call,) = writer.calls
    assert call["prompts"] == [tokenizer.decode(prompt_ids(tokenizer, [user(question)])) for question in asked]
    assert (call["temperature"], call["most"]) == (0, REPLY_TOKENS)
    assert call["ends"] == {2, tokenizer.eos_token_id}


def test_which_were_answered_rightly(monkeypatch):
    few = ALL["develop"][:3]
    said = [few[0].answers[0], "I do not know.", f"Well: {few[2].answers[-1].upper()}"]
    monkeypatch.setattr(questions, "continuations", Writer(chat_tokenizer(), [], lambda number: said[number]))
    assert rightly_answered(MODEL, chat_tokenizer(), few) == [True, False, True]


def test_a_real_model_replies_to_each_in_its_order():
    told = []
    asked = ["Why?", "What is the capital of France?", "Who?"]
    together = replies(MODEL, chat_tokenizer(), asked, progress=lambda *what: told.append(what))
    assert together == [replies(MODEL, chat_tokenizer(), [question])[0] for question in asked]
    assert told[-1] == ("answering questions", 3, 3)


def test_a_template_that_takes_no_user():
    with pytest.raises(DataError, match="cannot write these messages"):
        replies(MODEL, chat_tokenizer(template="{{ raise_exception('No.') }}"), ["Why?"])
