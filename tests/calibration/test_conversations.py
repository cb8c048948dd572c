"""Conversations that a model writes: both turns, no near-duplicates, only turns that end; and their windows."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.chat import END, STYLES, Writer, assistant, chat_tokenizer, system, user
from support.tiny import tiny_model

from selfpruner_hub.calibration import conversations
from selfpruner_hub.calibration.chat_template import conversation_ids, prompt_ids, user_turn
from selfpruner_hub.calibration.conversations import (
    CHAT,
    QUESTION_ATTEMPTS,
    Distinct,
    end_tokens,
    packed,
    write_conversations,
)
from selfpruner_hub.errors import DataError

MODEL = tiny_model("llama")
ASKED = [f"What is item {i} of list {i * i}?" for i in range(200)]
each_style = pytest.mark.parametrize("style", STYLES)


@pytest.fixture
def write(monkeypatch):
    """Write conversations by a script; gives them and the writer."""

    def write(questions, count, style="chatml", *, tokenizer=None, answer=lambda number: f"Answer {number}.",
        openings=("",), **more,
    ):  # fmt: skip
        tokenizer = tokenizer or chat_tokenizer(style)
        writer = Writer(tokenizer, questions, answer)
        monkeypatch.setattr(conversations, "continuations", writer)
        style = replace(CHAT, openings=openings)
        return write_conversations(MODEL, tokenizer, count, more.pop("seed", 0), style=style, **more), writer

    return write


@each_style
def test_both_turns_are_written_through_the_template(style, write):
    talks, writer = write(ASKED, 8, style)
    tokenizer = chat_tokenizer(style)
    prompts = CHAT.systems if style in ("chatml", "llama3") else (None,)
    for number, talk in enumerate(talks):
        prompt = prompts[number % len(prompts)]
        said = [*([system(prompt)] if prompt else []), user(ASKED[number]), assistant(f"Answer {number}.")]
        assert list(talk.ids) == conversation_ids(tokenizer, said)
        theirs = [i for i, answered in zip(talk.ids, talk.answered, strict=True) if answered]
        assert tokenizer.decode(theirs) == said[-1]["content"] + END[style]
    assert len(talks) == 8
    (asked,), (answered,) = writer.of("questions"), writer.of("answers")
    before = [tokenizer.decode(user_turn(tokenizer, prompt).before) for prompt in prompts]
    assert asked["prompts"] == [before[i % len(prompts)] for i in range(len(asked["prompts"]))]
    first = prompt_ids(tokenizer, [*([system(prompts[0])] if prompts[0] else []), user(ASKED[0])])
    assert answered["prompts"][0] == tokenizer.decode(first)
    assert len(answered["prompts"]) == 8
    assert (asked["most"], answered["most"]) == (CHAT.user_tokens, CHAT.answer_tokens)


def test_questions_open_in_turn_with_words_of_their_own(write):
    rests = [f" is item {i} of list {i * i}?" for i in range(200)]
    talks, writer = write(rests, 8, openings=("What", "Where"))
    tokenizer = chat_tokenizer()
    assert all(prompt.endswith(("What", "Where")) for prompt in writer.of("questions")[0]["prompts"])
    said = [tokenizer.decode(talk.ids) for talk in talks]
    assert ["What is item" in text for text in said].count(True) == 4
    assert all(f"<|im_start|>user\n{'What' if 'What' in text else 'Where'} is item" in text for text in said)


@each_style
def test_turns_end_where_the_template_ends_them(style, write):
    _, writer = write(ASKED, 3, style)
    tokenizer = chat_tokenizer(style)
    ends = {2, tokenizer.convert_tokens_to_ids(END[style])}
    assert writer.of("answers")[0]["ends"] == ends
    assert writer.of("questions")[0]["ends"] == ends | {user_turn(tokenizer, None).stop}


def test_answers_have_their_temperature_and_questions_that_of_the_model(write):
    _, writer = write(ASKED, 3)
    assert writer.of("answers")[0]["temperature"] == CHAT.answer_temperature
    assert writer.of("questions")[0]["temperature"] == CHAT.user_temperature


def test_near_duplicates_are_dropped(write):
    same = "Who wrote the long book about the white whale and the sea?"
    questions = [same, same.upper(), same.replace("long ", ""), "Who wrote Emma?", same.replace("?", " then?")]
    talks, writer = write([*questions, *ASKED], 3)
    asked = [prompt.count("white whale") for prompt in writer.of("answers")[0]["prompts"]]
    assert asked == [1, 0, 0]
    assert len(talks) == 3


def test_turns_that_do_not_end_or_say_nothing_are_dropped(write):
    talks, writer = write([None, "", "Who wrote Emma?", None, "  \n"], 2)
    assert len(talks) == 1
    (prompt,) = writer.of("answers")[0]["prompts"]
    assert "Who wrote Emma?" in prompt


def test_answers_that_say_nothing_are_dropped(write):
    talks, _ = write(ASKED, 4, answer=lambda number: "" if number == 2 else "Yes.")
    assert len(talks) == 3


def test_a_cut_answer_has_no_end_that_the_model_wrote(write):
    talks, _ = write(ASKED, 2, answer=lambda number: None if number else "Yes.")
    whole, cut = talks
    end = chat_tokenizer().convert_tokens_to_ids(END["chatml"])
    assert whole.ids[-2] == end  # and a line break after it, as in the template
    assert whole.answered[-2:] == (True, False)
    assert cut.ids[-1] != end
    assert sum(cut.answered) == CHAT.answer_tokens == sum(cut.answered[-CHAT.answer_tokens :])
    assert sum(whole.answered) == len("Yes.") + 1


def test_more_is_written_until_there_is_enough(write):
    few = [None if i % 10 else f"What is {i}?" for i in range(400)]
    talks, writer = write(few, 5)
    assert len(talks) == 5
    assert 1 < len(writer.of("questions")) <= QUESTION_ATTEMPTS
    seeds = [call["seed"] for call in writer.of("questions")]
    assert len(set(seeds)) == len(seeds)


def test_a_model_that_repeats_itself_gives_what_it_has(write):
    talks, writer = write(["Who are you?"] * 10_000, 5)
    assert len(talks) == 1
    assert len(writer.of("questions")) == QUESTION_ATTEMPTS


def test_no_seed_of_one_run_is_one_of_the_next(write):
    used = [{call["seed"] for call in write(["Who?"] * 999, 5, seed=seed)[1].of("questions")} for seed in (0, 1, 2)]
    assert not used[0] & used[1]
    assert not used[1] & used[2]


def test_what_was_written_before_is_not_written_again(write):
    distinct = Distinct()
    first, _ = write(ASKED, 4, distinct=distinct)
    again, _ = write(ASKED, 4, distinct=distinct)
    assert len(set(first) | set(again)) == 8


def test_a_template_without_a_users_turn(write):
    with pytest.raises(DataError, match="no user's turn") as caught:
        write(ASKED, 2, tokenizer=chat_tokenizer(template="{{ raise_exception('No.') }}"))
    assert "wikitext2" in caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("questions", [[], [""] * 5000])
def test_a_model_that_ends_no_users_turn(questions, write):
    with pytest.raises(DataError, match="no user's turn that ends") as caught:
        write(questions, 2)
    assert "data=PATH" in caught.value.hint


@pytest.fixture(scope="module")
def noise():
    """What the random model writes: it meets an end of a turn now and then."""
    tokenizer = chat_tokenizer()
    return [write_conversations(MODEL, tokenizer, 6, seed) for seed in (3, 3, 4)]


def test_the_seed_decides_the_conversations(noise):
    first, again, other = noise
    assert len(first) == 6
    assert first == again
    assert not set(first) & set(other)


def test_a_real_model_writes_by_the_template(noise):
    tokenizer = chat_tokenizer()
    for talk in noise[0]:
        text = tokenizer.decode(talk.ids)
        assert text.startswith("<|im_start|>system\n")
        assert text.count("<|im_start|>user\n") == text.count("<|im_start|>assistant\n") == 1
        assert 0 < sum(talk.answered) <= CHAT.answer_tokens + 1


def test_progress_tells_turns():
    told = []
    write_conversations(MODEL, chat_tokenizer(), 2, 0, progress=lambda *what: told.append(what))
    assert {what for what, *_ in told} == {"writing questions", "writing answers"}
    assert told[-1] == ("writing answers", 2, 2)


@pytest.mark.parametrize(
    ("model", "generation", "tokenizer", "found"),
    [(2, [2, 7], 4, {2, 4, 7}), (None, None, None, set()), ([1, 2], 3, None, {1, 2, 3}), (0, None, 0, {0})],
)
def test_ends_are_those_of_all_configurations(model, generation, tokenizer, found):
    one, other, third = (SimpleNamespace(eos_token_id=ids) for ids in (model, generation, tokenizer))
    assert end_tokens(SimpleNamespace(config=one, generation_config=other), third) == found
    assert end_tokens(SimpleNamespace(config=one), third) == found - {3, 7}


def test_distinct_by_trigrams_of_words():
    distinct = Distinct()
    assert distinct.add("a b c d e f")  # abc bcd cde def
    assert not distinct.add("A  B c\nd e f")
    assert not distinct.add("a b c d e f g h")  # 4 of 6
    assert not distinct.add("x a b c d e")  # 3 of 5
    assert not distinct.add("x y a b c d e")  # 3 of 6
    assert distinct.add("x y z a b c d e")  # 3 of 7
    assert distinct.add("hi")
    assert not distinct.add("Hi")
    assert distinct.add("hi there")


def talk(first, length):
    return range(first, first + length)


def test_every_window_begins_with_a_conversation_and_only_the_last_is_cut():
    talks = [talk(100 * i, length) for i, length in enumerate([5, 3, 4, 10, 2, 6, 20, 8, 1, 3], 1)]
    windows = packed(talks, 8)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [
        [100, 101, 102, 103, 104, 200, 201, 202],
        [300, 301, 302, 303, 400, 401, 402, 403],
        [500, 501, 600, 601, 602, 603, 604, 605],
        [*range(700, 708)],
        [*range(800, 808)],
    ]  # and the last two do not fill one
    assert packed(talks, 8, most=2).tolist() == windows[:2].tolist()


def test_nothing_packed_is_no_window():
    assert packed([], 8).shape == packed([talk(0, 7)], 8).shape == (0, 8)
