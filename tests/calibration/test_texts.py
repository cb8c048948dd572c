"""The texts of a run: shares of the sources, defaults and warnings, and written text that is kept."""

import logging
from dataclasses import replace

import pytest
import torch
from support.chat import Writer, assistant, chat_tokenizer, user
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.calibration import conversations, corpus, texts
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.texts import Texts
from selfpruner_hub.errors import DataError, UserError
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import DEFAULT_RUN, Run

WINDOW, CALIBRATION, FITNESS = 32, 20, 8
SETTINGS = resolve(
    None, evaluations=0, window=WINDOW, calibration_tokens=WINDOW * CALIBRATION, fitness_tokens=WINDOW * FITNESS
)
QUESTIONS = [f"What is item {i} of list {i * i}?" for i in range(4000)]
TALKS = [[user(question), assistant("It is a number.")] for question in QUESTIONS[:60]]


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def letters(tmp_path):
    """A function: a file of one letter alone, which a random model does not write."""

    def file(letter, windows=CALIBRATION + FITNESS):
        path = tmp_path / f"{letter}.txt"
        path.write_text(letter * (WINDOW - 1) * windows)  # the tokenizer begins each window with BOS
        return str(path)

    return file


@pytest.fixture
def writer(monkeypatch):
    """Conversations come from a script."""
    made = Writer(chat_tokenizer(), QUESTIONS)
    monkeypatch.setattr(conversations, "continuations", made)
    return made


@pytest.fixture
def sampled(monkeypatch):
    """How often the model wrote plain text."""
    calls = []
    sample = corpus.sample_windows

    def spy(*arguments, **more):
        calls.append(more)
        return sample(*arguments, **more)

    monkeypatch.setattr(corpus, "sample_windows", spy)
    return calls


@pytest.fixture
def loaded(monkeypatch):
    """Sources that are asked for; each gives windows of its own."""
    asked = []

    def load(source, _tokenizer, *, tokens, window, **_):
        asked.append(source)
        return Corpus.of(str(source), torch.full((-(-tokens // window), window), len(asked)))

    monkeypatch.setattr(texts, "load_corpus", load)
    return asked


def read(model, data, settings=SETTINGS, *, tokenizer=None, seed=0, checkpoints=None):
    found = Texts(model, tokenizer or chat_tokenizer()).read(
        data, settings, Run(seed=seed, checkpoints=checkpoints or Checkpoints())
    )
    assert found.unseen is None  # nothing is searched
    return found.calibration, found.search


def kinds(windows):
    """Of each window, its letter, or `own` for what the model wrote."""
    rows = [set(row[1:]) for row in windows.tolist()]  # without BOS
    return [chr(row.pop()) if len(row) == 1 else "own" for row in rows]


def count(windows, *names):
    found = kinds(windows)
    assert set(found) <= set(names)
    return tuple(found.count(name) for name in names)


@pytest.mark.parametrize(
    ("shares", "calibration", "fitness"),
    [(0.5, (10, 10), (4, 4)), ((3, 1), (15, 5), (6, 2)), ((0.25, 0.75), (5, 15), (2, 6)), ((1, 1), (10, 10), (4, 4))],
)
def test_each_source_gives_its_share_to_both(shares, calibration, fitness, model, letters):
    data = f"{letters('A')}+{letters('B')}"
    found = read(model, data, replace(SETTINGS, shares=shares))
    assert count(found[0].windows, "A", "B") == calibration
    assert count(found[1].windows, "A", "B") == fitness
    assert [text.name for text in found] == ["A.txt and B.txt"] * 2
    assert set(kinds(found[0].windows[:10])) == {"A", "B"}  # the first stand for all


@pytest.mark.parametrize(
    ("data", "share", "own", "others"),
    [
        ("self+{A}", 0.5, (7, 3), (14, 6)),
        ("{A}+self+{B}", 0.5, (4, 2), (16, 8)),
        ("{A}+self", 1, (10, 4), (10, 4)),
        ("{A}+{B}", 0.1, (0, 0), (20, 8)),
        ("self", 0.5, (20, 8), (0, 0)),
    ],
)
def test_a_source_that_the_model_writes_has_a_share_of_its_own(data, share, own, others, model, letters):
    found = read(model, data.format(A=letters("A"), B=letters("B")), replace(SETTINGS, shares=share))
    assert tuple(kinds(text.windows).count("own") for text in found) == own
    assert tuple(len(text.windows) - written for text, written in zip(found, own, strict=True)) == others


def test_three_sources_one_of_which_the_model_writes(model, letters):
    data = f"{letters('A')}+self+{letters('B')}"
    first, second = read(model, data, replace(SETTINGS, shares=(2, 1, 1)))
    assert count(first.windows, "A", "own", "B") == (10, 5, 5)
    assert count(second.windows, "A", "own", "B") == (4, 2, 2)
    own = [{tuple(row) for row in part.windows.tolist() if len(set(row[1:])) > 1} for part in (first, second)]
    assert not own[0] & own[1]


@pytest.mark.parametrize("shares", [(1, 1e-9), (1e-9, 1)])
def test_every_source_gives_a_window_at_least(shares, model, letters):
    found = read(model, f"{letters('A')}+{letters('B')}", replace(SETTINGS, shares=shares))
    assert [set(kinds(text.windows)) for text in found] == [{"A", "B"}] * 2


def test_a_few_tokens_of_two_sources(model, letters):
    few = replace(SETTINGS, calibration_tokens=1, fitness_tokens=1)
    found = read(model, f"{letters('A')}+{letters('B')}", few)
    assert [count(text.windows, "A", "B") for text in found] == [(1, 1), (1, 1)]


@pytest.mark.parametrize(("data", "shares"), [("self", (1, 1)), ("self+chat", (1,)), ("self+self", (1, 1))])
def test_shares_fit_the_sources(data, shares, model):
    with pytest.raises(UserError, match=rf"{len(shares)} shares do not fit \d source") as caught:
        read(model, data, replace(SETTINGS, shares=shares))
    assert caught.value.hint


def test_a_text_too_short_for_its_share(model, letters):
    with pytest.raises(DataError, match="are needed"):
        read(model, f"{letters('A', 5)}+self")
    found = read(model, f"{letters('A', 10)}+self")  # half of its share is enough
    assert [count(text.windows, "A", "own") for text in found] == [(7, 7), (3, 3)]


def test_windows_are_no_longer_than_the_model_reads(model):
    found = read(tiny_model("llama", max_position_embeddings=16), "self")
    assert [text.windows.shape for text in found] == [(40, 16), (16, 16)]


@pytest.mark.parametrize(
    ("tokenizer", "expected"), [(chat_tokenizer(), ["chat", "wikitext2"]), (tiny_tokenizer(), ["wikitext2"])]
)
def test_the_default_is_a_mixture_for_a_chat_model_alone(tokenizer, expected, model, loaded):
    read(model, None, tokenizer=tokenizer)
    assert loaded == expected


def test_without_a_tokenizer_the_default_says_what_works(model):
    with pytest.raises(DataError, match='tokenizer.*data="self"'):
        Texts(model, None).read(None, SETTINGS, DEFAULT_RUN)


@pytest.mark.parametrize(
    ("data", "tokenizer", "warned"),
    [
        ("wikitext2", chat_tokenizer(), True),
        ("c4", chat_tokenizer(), True),
        ("wikitext2+c4", chat_tokenizer(), True),
        ("chat+wikitext2", chat_tokenizer(), False),
        ("chat", chat_tokenizer(), False),
        ("self", chat_tokenizer(), False),
        (None, chat_tokenizer(), False),
        (TALKS, chat_tokenizer(), False),
        ("wikitext2", tiny_tokenizer(), False),
        (None, tiny_tokenizer(), False),
    ],
)
@pytest.mark.usefixtures("loaded")
def test_a_chat_model_on_articles_alone_is_warned_of(data, tokenizer, warned, model, caplog):
    with caplog.at_level(logging.WARNING, "selfpruner_hub"):
        read(model, data, tokenizer=tokenizer)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == warned
    if warned:
        assert f'data="chat+{data}"' in said[0]
        assert "\n" not in said[0]


def test_what_a_file_gave_is_read_once(model, loaded, letters):
    known, path = Texts(model, chat_tokenizer()), letters("A")
    first = known.read(path, SETTINGS, DEFAULT_RUN)
    assert known.read(path, SETTINGS, DEFAULT_RUN).calibration.sha256 == first.calibration.sha256
    assert len(loaded) == 1
    known.read(path, SETTINGS, Run(seed=1))
    known.read(path, replace(SETTINGS, fitness_tokens=WINDOW), DEFAULT_RUN)
    assert len(loaded) == 3


def test_a_list_is_read_each_time(model, loaded):
    """Its entries may be others by then."""
    talks, known = list(TALKS), Texts(model, chat_tokenizer())
    known.read(talks, SETTINGS, DEFAULT_RUN)
    known.read(talks, SETTINGS, DEFAULT_RUN)
    assert len(loaded) == 2


@pytest.mark.parametrize("data", ["chat", "self", "chat+self"])
def test_what_the_model_wrote_is_kept_and_used_again(data, model, tmp_path, writer, sampled):
    first = read(model, data, checkpoints=Checkpoints(tmp_path))
    assert len(list(tmp_path.iterdir())) == len(data.split("+"))
    wrote = len(writer.calls), len(sampled)
    again = read(model, data, checkpoints=Checkpoints(tmp_path))
    assert (len(writer.calls), len(sampled)) == wrote
    assert [text.record() for text in again] == [text.record() for text in first]
    assert all(torch.equal(a.windows, b.windows) for a, b in zip(first, again, strict=True))


def test_what_the_model_wrote_for_another_run_is_kept_for_this_one_too(model, tmp_path, writer, sampled):
    """Or a run that is killed might resume with another text."""
    known = Texts(model, chat_tokenizer())
    first = known.read("self", SETTINGS, DEFAULT_RUN)
    known.read("self", SETTINGS, Run(checkpoints=Checkpoints(tmp_path)))
    wrote = len(sampled)
    again = read(model, "self", checkpoints=Checkpoints(tmp_path))
    assert len(sampled) == wrote
    assert again[0].sha256 == first.calibration.sha256


@pytest.mark.parametrize(
    "other",
    [
        {"model": tiny_model("llama", seed=1)},
        {"seed": 1},
        {"settings": replace(SETTINGS, window=16)},
        {"settings": replace(SETTINGS, fitness_tokens=WINDOW * 9)},
        {"data": "self+c4", "settings": replace(SETTINGS, shares=(3, 1))},
    ],
    ids=lambda other: "-".join(other),
)
def test_kept_text_is_of_the_same_model_seed_and_size(other, model, tmp_path, sampled, monkeypatch):
    monkeypatch.setattr("selfpruner_hub.calibration.corpus.entries", lambda *_: iter(["A" * 10_000]))
    read(model, "self", checkpoints=Checkpoints(tmp_path))
    read(**{"model": model, "data": "self", "checkpoints": Checkpoints(tmp_path), **other})
    assert len(sampled) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_text_of_others_is_not_kept(model, tmp_path, letters):
    read(model, letters("A"), checkpoints=Checkpoints(tmp_path / "stages"))
    assert not (tmp_path / "stages").exists()


def test_conversations_of_a_list(model):
    first, second = read(model, TALKS)
    assert first.name == second.name == "list"
    begins = chat_tokenizer().decode(first.windows[0])
    assert begins.startswith("<|im_start|>system\nYou are ")
