"""Texts and conversations of a source: from files, lists and data sets, and one clear line for what is neither."""

import json
import re

import datasets
import pytest
from support.chat import assistant, user
from support.tiny import tiny_tokenizer
from support.trained import KINDS, TEXT, trained_tokenizer

from selfpruner_hub.calibration import text_sources
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
    {"messages": [{"role": "gpt", "content": "Hi"}]},
    {"messages": [{"role": "\ud800", "content": "Hi"}]},
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


PARTS = [{"type": "text", "text": "Honey, "}, {"type": "text", "text": "and wax."}]


def test_the_text_parts_of_a_content_are_joined(lines):
    told = [user("What do bees make?"), {"role": "assistant", "content": PARTS}]
    joined = [TALK[0], assistant("Honey, and wax.")]
    assert list(entries(lines({"messages": told}))) == list(entries([told])) == [joined]


def test_empty_calls_of_tools_and_empty_fields_do_not_reach_the_template(lines):
    """A template may write no answer where there is a list of calls."""
    told = [TALK[0], {**assistant("Honey."), "tool_calls": [], "name": None}]
    plain = [[TALK[0], assistant("Honey.")]]
    assert list(entries([told])) == list(entries(lines({"messages": told}))) == plain


@pytest.mark.parametrize(
    "message",
    [
        {"content": None},
        {"content": None, "tool_calls": [{"function": {"name": "count"}}]},
        {"content": "", "tool_calls": [{"function": {"name": "count"}}]},
        {"content": 5},
        {"content": {}},
        {"content": []},
        {"content": ["Honey."]},
        {"content": [*PARTS, {"type": "image_url", "image_url": {"url": "https://example.org/bee.png"}}]},
        {"content": [{"type": "text", "text": None}]},
    ],
    ids=str,
)
def test_a_content_that_is_no_text_is_refused_with_its_line(message, lines):
    path = lines({"messages": TALK}, {"messages": [TALK[0], {"role": "assistant", **message}]})
    with pytest.raises(DataError, match=r"data\.jsonl, line 2: a message holds something else than text") as caught:
        list(entries(path))
    assert "\n" not in str(caught.value)
    assert "Leave such conversations out" in caught.value.hint


def test_a_line_nested_too_deep_is_named(lines):
    deep = '{"text":' + "[" * 100_000 + "]" * 100_000 + "}"
    with pytest.raises(DataError, match="line 2: expected a text"):
        list(entries(lines({"text": "fine"}, deep)))


def test_half_of_an_emoji_is_read_as_a_replacement_character(lines):
    half, whole = r'"\ud83d cut"', r'"\ud83d\ude00 whole"'
    path = lines(f'{{"text": {half}}}', f'{{"messages": [{{"role": "user", "content": {whole}}}]}}')
    assert list(entries(path)) == ["\ufffd cut", [user("\U0001f600 whole")]]
    assert list(entries(["\ud83d cut"])) == ["\ufffd cut"]


@pytest.mark.parametrize("source", [5, 0.5, object()], ids=lambda source: type(source).__name__)
def test_what_is_neither_a_path_nor_a_list_is_refused(source):
    with pytest.raises(DataError, match=", not a text"):
        list(entries(source))


def test_a_text_in_place_of_a_path_is_not_printed_whole():
    with pytest.raises(DataError, match="Unknown data 'Bees make honey") as caught:
        list(entries("Bees make honey. " * 1000))
    assert len(str(caught.value)) < 400


@pytest.fixture
def short_pieces(monkeypatch):
    monkeypatch.setattr(text_sources, "PIECE", 100)


LONG = "\n\n".join("\n".join(TEXT) for _ in range(3))


SPACED = "".join(f" \n = {line[:9].strip()} = \n \n {line.strip()} \n" for line in TEXT * 3)
"""Lines that begin and end with a space, as those of WikiText-2 do."""
WORDS = " ".join(TEXT).replace("\n", " ")


@pytest.mark.parametrize("text", [LONG, SPACED, WORDS], ids=["lines", "spaced lines", "one line"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_token_ids_of_the_whole_text(kind, text, short_pieces):
    """A SentencePiece tokenizer may start each piece with one more token."""
    tokenizer = trained_tokenizer(kind)
    whole, found = tokenizer(text, add_special_tokens=False)["input_ids"], encode([text], tokenizer, limit=1 << 20)
    if not kind.startswith("sentencepiece"):
        assert found == whole
    assert tokenizer.decode(found).replace(" ", "") == tokenizer.decode(whole).replace(" ", "")
    assert len(whole) <= len(found) <= len(whole) + len(text) // 50


@pytest.mark.parametrize(
    "text", [LONG.replace("\r", ""), "a" * 250, "é\n" * 150, "\n" * 250, ""], ids=["lines", "one", "é", "blank", "none"]
)
def test_a_file_in_pieces_is_the_whole_text(text, short_pieces, tmp_path):
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    found = list(entries(tmp_path / "a.txt"))
    assert "".join(found) == text
    assert all(len(piece) <= 100 for piece in found)


def test_of_a_long_file_only_the_beginning_is_read(short_pieces, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abcd\n" * 10_000 + b"\xff")  # which cannot be read
    asked = []

    def counting(text, **_):
        asked.append(text)
        return {"input_ids": list(text.encode())}

    assert encode(entries(path), counting, limit=120) == list(b"abcd\n" * 24)
    assert len(asked) == 2
    with pytest.raises(DataError, match="not UTF-8"):
        encode(entries(path), counting, limit=1 << 20)


def of_texts(*texts):
    yield from texts


def begun(source):
    next(source)
    return source


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (["{file}", "{file}"], 'a list of names of texts, .*Join the names by \\+, as in data="{file}\\+{file}"'),
        (("{file}", "wikitext2"), "a tuple of names of texts"),
        (["chat"], 'a list of names .*data="chat"'),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}),
            r"DatasetDict of 'train'.*data\[",
        ),
        ({"text": "a"}, "data is a dict of 'text', not a text"),
        (5, "data is a int, not a text"),
        ([], "data is a list without entries"),
        (iter([]), "a list_iterator, which can be read once alone"),
        (map(str, [1]), "a map, which can be read once alone"),
        (begun(of_texts("a", "b")), "a generator that was read before"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_are_no_texts(source, said, tmp_path):
    """Most of them are iterables of strings, and would be read as such."""
    (tmp_path / "a.txt").touch()
    if isinstance(source, (list, tuple)):
        source = type(source)(each.format(file=tmp_path / "a.txt") for each in source)
    with pytest.raises(DataError, match=said.replace("{file}", re.escape(str(tmp_path / "a.txt")))) as caught:
        list(entries(source))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


def test_texts_are_no_names(tmp_path, monkeypatch):
    """Not even if some of them are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bees").touch()
    for texts in (["bees", "make honey"], ("x" * 5000,), of_texts("bees")):
        assert all(isinstance(each, str) for each in entries(texts))


def test_a_hub_that_fails_after_some_rows(monkeypatch):
    def rows(*_, **__):
        yield {"text": "One."}
        raise OSError("Connection reset by peer")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(DataError, match=r"Cannot load allenai/c4 .*\(OSError\)"):
        list(entries("c4"))


def test_articles_for_a_measurement_are_one_text_as_in_published_figures(monkeypatch):
    rows = ["", " = Bees = \n", " Bees make honey . \n"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": row} for row in rows])
    assert list(entries("wikitext2", "test")) == ["\n\n".join(rows)]
    assert list(entries("wikitext2")) == list(entries("c4", "test")) == rows
