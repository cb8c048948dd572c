"""Short questions that the parent writes: plain text after examples, asked through the template, none of a measure."""

import pytest
from support.chat import Writer, chat_tokenizer, user
from support.tiny import tiny_model

from selfpruner_hub.calibration import conversations
from selfpruner_hub.calibration.chat_template import prompt_ids
from selfpruner_hub.calibration.conversations import Distinct
from selfpruner_hub.errors import DataError
from selfpruner_hub.evaluation.questions import HALVES, load_questions
from selfpruner_hub.recovery import questions

MODEL = tiny_model("llama")
RESTS = [f" {i} of list {i * i}?" for i in range(900)]


@pytest.fixture
def write(monkeypatch):
    """Write questions by a script; gives the conversations and the writer."""

    def write(rests, count, seed=0, **more):
        writer = Writer(chat_tokenizer(), rests)
        monkeypatch.setattr(conversations, "continuations", writer)
        return questions.write_questions(MODEL, chat_tokenizer(), count, seed, **more), writer

    return write


def test_examples_stand_in_front_and_the_template_around_what_is_answered(write):
    talks, writer = write(RESTS, 12)
    (asked,), (answered,) = writer.of("questions"), writer.of("answers")
    assert len({prompt.splitlines()[0] for prompt in asked["prompts"]}) > 8  # topics
    opened = [prompt.rsplit("Q:", 1)[1].strip() for prompt in asked["prompts"]]
    assert all(prompt.count("\nA: ") == questions.SHOTS for prompt in asked["prompts"])
    assert (
        len({prompt.partition("Q:")[2].partition("\n")[0] for prompt in asked["prompts"]}) > 3
    )  # other examples first
    tokenizer = chat_tokenizer()
    wanted = [f"{opening} {rest.strip()}".strip() for opening, rest in zip(opened, RESTS, strict=False)][:12]
    assert answered["prompts"] == [tokenizer.decode(prompt_ids(tokenizer, [user(text)])) for text in wanted]
    assert len(talks) == 12
    assert (answered["temperature"], answered["most"]) == (0.0, questions.QUESTIONS.answer_tokens)


def test_a_question_ends_with_its_line(write):
    tokenizer = chat_tokenizer()
    (line_break,) = tokenizer("\n", add_special_tokens=False)["input_ids"]
    _, writer = write(RESTS, 3)
    assert {line_break, tokenizer.eos_token_id} <= writer.of("questions")[0]["ends"]
    assert line_break not in writer.of("answers")[0]["ends"]
    talks, _ = write([None, "", " is it?", None, " \n"], 2)
    assert ["is it?" in tokenizer.decode(talk.ids) for talk in talks] == [True]


def test_the_seed_decides_and_what_was_asked_before_is_not_asked_again(write):
    first, again, other = (write(RESTS, 8, seed)[1].of("questions")[0] for seed in (0, 0, 1))
    assert first["prompts"] == again["prompts"] != other["prompts"]
    assert first["seed"] != other["seed"]
    distinct = Distinct()
    both = [set(write(RESTS, 8, distinct=distinct)[0]) for _ in range(2)]
    assert len(both[0] | both[1]) == 16


def test_a_model_that_writes_nothing_is_refused(write):
    with pytest.raises(DataError, match="wrote no question that ends") as caught:
        write([], 2)
    assert "question_share=0" in caught.value.hint


def test_no_example_is_a_question_that_measures():
    measured = Distinct()
    for half in HALVES:
        for each in load_questions(half):
            measured.add(each.question)
    assert all(measured.add(question) for question, _ in questions.QUESTION_EXAMPLES)
