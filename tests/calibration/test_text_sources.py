"""Texts and conversations of a source: from files, lists and data sets, and one clear line for what is neither."""

import json

import datasets
import pytest
from support.chat import assistant, user
from support.tiny import tiny_tokenizer

from selfpruner_hub.calibration.text_sources import encode, entries, name_of
from selfpruner_hub.errors import DataError

TALK = [user("What do bees make?"), assistant("Honey.")]
OTHER = [user("And cows?"), assistant("Milk.")]


@pytest.fixture
def lines(tmp_path):
    """Write a .jsonl of values."""

    def write(*values):
        path = tmp_path / "data.jsonl"
        path.write_text("\n".join(v if isinstance(v, str) else json.dumps(v) for v in values), encoding="utf-8")
        return path

    return write


def test_objects_of_a_file(lines):
    path = lines({"text": "One."}, "", {"id": 3, "text": "Two."}, {"messages": TALK})
    assert list(entries(path)) == list(entries(str(path))) == ["One.", "Two.", TALK]


def test_a_text_file_is_one_text(tmp_path):
    (tmp_path / "a.txt").write_text('{"text": "a"}\n\nb\n')
    assert list(entries(tmp_path / "a.txt")) == ['{"text": "a"}\n\nb\n']


@pytest.mark.parametrize(
    "source",
    [
        [TALK, OTHER],
        (TALK, OTHER),
        [{"messages": TALK}, {"messages": OTHER, "text": "not this"}],
        [tuple(TALK), OTHER],
        datasets.Dataset.from_list([{"messages": TALK}, {"messages": OTHER}]),
    ],
    ids=lambda source: type(source).__name__,
)
def test_conversations_of_lists_and_data_sets(source):
    assert list(entries(source)) == [TALK, OTHER]


@pytest.mark.parametrize(
    "source",
    [
        ["One.", "Two."],
        [{"text": "One."}, {"text": "Two.", "n": 1}],
        datasets.Dataset.from_dict({"text": ["One.", "Two."]}),
        datasets.Dataset.from_dict({"text": ["One.", "Two."]}).to_iterable_dataset(),
    ],
    ids=lambda source: type(source).__name__,
)
def test_texts_of_lists_and_data_sets(source):
    assert list(entries(source)) == ["One.", "Two."]


@pytest.mark.parametrize("source", ["", ".", "notes.pdf"])
def test_an_unknown_source_is_named_as_it_was_given(source):
    with pytest.raises(DataError, match=f"Unknown data {source!r}\\."):
        list(entries(source))


def test_entries_are_read_one_at_a_time():
    def texts():
        yield "One."
        pytest.fail("read on")

    assert next(entries(texts())) == "One."


WRONG = [
    5,
    None,
    {},
    {"txt": "a"},
    {"text": 5},
    {"text": None},
    {"messages": []},
    {"messages": ["Hi"]},
    {"messages": {"role": "user", "content": "Hi"}},
    {"messages": [{"from": "human", "value": "Hi"}]},
    {"messages": [{"role": "user"}]},
    {"messages": [*TALK, {"role": None, "content": "Hi"}]},
    {"conversations": TALK},
]


@pytest.mark.parametrize("value", [*WRONG, "{", '"text"', json.dumps(TALK)], ids=str)
def test_a_wrong_line_is_named(value, lines):
    path = lines({"text": "fine"}, "", value if isinstance(value, str) else json.dumps(value))
    with pytest.raises(DataError, match=r"data\.jsonl, line 3: expected a text, or an object") as caught:
        list(entries(path))
    assert "\n" not in str(caught.value)
    assert '"role" and a "content"' in caught.value.hint


@pytest.mark.parametrize("value", [*WRONG, *TALK, ["a text"], []], ids=str)
def test_a_wrong_entry_is_numbered(value):
    with pytest.raises(DataError, match=r"^data, entry 2: expected") as caught:
        list(entries([TALK, value]))
    assert "\n" not in str(caught.value)


def test_names_say_nothing_of_where_a_file_is(tmp_path):
    assert name_of(tmp_path / "mine.jsonl") == name_of(str(tmp_path / "mine.jsonl")) == "mine.jsonl"
    assert [name_of(source) for source in ("chat", "self", "wikitext2", "c4")] == ["chat", "self", "wikitext2", "c4"]
    assert name_of([TALK]) == "list"
    assert name_of(datasets.Dataset.from_dict({"text": ["a"]})) == "Dataset"


def test_no_text_is_read_beyond_the_limit():
    def texts():
        yield from ("abcd", "efgh")
        pytest.fail("read on")

    assert encode(texts(), tiny_tokenizer(), limit=6) == list(b"abcdef")
