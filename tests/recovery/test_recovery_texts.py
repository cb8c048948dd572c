"""The texts of recovery: their shares, which tokens count, and what is kept."""

from __future__ import annotations

import re

import pytest
import torch
from support.chat import Writer, chat_tokenizer
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.calibration import conversations
from selfpruner_hub.calibration.conversations import Conversation
from selfpruner_hub.calibration.corpus import Corpus, load_corpus
from selfpruner_hub.errors import DataError
from selfpruner_hub.recovery import texts
from selfpruner_hub.recovery.settings import resolve_recovery
from selfpruner_hub.recovery.texts import Share
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

MODEL = tiny_model("llama")
ASKED = [f"Is {i} even?" for i in range(4000)]
WINDOW = 256
TEXT = "The quick brown fox jumps over the lazy dog. " * 100


@pytest.fixture
def writer(monkeypatch, tmp_path):
    """A writer of texts in `WINDOW` tokens; the model's turns are by a script."""
    tokenizer = chat_tokenizer()
    script = Writer(tokenizer, ASKED, lambda number: f"Answer {number}.")
    monkeypatch.setattr(conversations, "continuations", script)
    made = texts.Writer(MODEL, tokenizer, WINDOW, Run(checkpoints=Checkpoints(tmp_path), seed=3))
    return made, script, tokenizer


@pytest.mark.parametrize(
    ("data", "chats", "wanted"),
    [
        (None, True, {"conversations": 0.3, "questions": 0.3, "wikitext2": 0.4}),
        (None, False, {"self": 0.6, "wikitext2": 0.4}),
        ("chat", True, {"conversations": 0.5, "questions": 0.5}),
        ("self+chat", True, {"self": 0.5, "conversations": 0.25, "questions": 0.25}),
        ("a.txt+b.txt", True, {"a.txt": 0.5, "b.txt": 0.5}),
    ],
)
def test_shares(data, chats, wanted):
    tokenizer = chat_tokenizer() if chats else tiny_tokenizer()
    found = texts.shares(data, tokenizer, resolve_recovery())
    assert {share.name: share.share for share in found} == pytest.approx(wanted)


def test_a_share_of_nothing_is_left_out():
    found = texts.shares(None, chat_tokenizer(), resolve_recovery(question_share=0.0))
    assert [share.name for share in found] == ["conversations", "wikitext2"]


@pytest.mark.parametrize("name", ["conversations", "questions"])
def test_what_counts_is_answers(name, writer):
    made, _, tokenizer = writer
    text, held = made.training(Share(name, "chat", 1.0), 6, passes=2)
    assert held is None
    assert text.windows.shape == (3, WINDOW)  # half of the windows, each read twice
    for ids, counted in zip(text.windows, text.counted, strict=True):
        said = tokenizer.decode(ids[1:][counted])
        assert "Answer" in said
        assert "even?" not in said
        assert "assistant" not in said


def test_text_that_is_read_gives_its_end_to_decide_by(writer):
    made, _, tokenizer = writer
    source = [TEXT]
    text, held = made.training(Share("list", source, 1.0), 1000, passes=2)
    whole = "".join(tokenizer.decode(ids[1:]) for ids in torch.cat([text.windows, held.windows]))
    assert TEXT.startswith(whole)
    assert len(whole) > len(TEXT) - WINDOW
    assert len(held.windows) == (len(text.windows) + len(held.windows)) // texts.DECIDING_PART
    assert text.counted.all()


@pytest.mark.parametrize(("calibrated", "first"), [(0, 4 * 8), (50, 50), (1000, 200 - 80)])
def test_what_decides_is_spread_over_text_that_the_cut_has_not_seen(writer, monkeypatch, calibrated, first):
    made, _, tokenizer = writer
    monkeypatch.setattr(texts, "CALIBRATED", calibrated * WINDOW)
    lines = ["".join(f"{number:06d}, " for number in range(200 * WINDOW // 8))]
    text, held = made.training(Share("list", lines, 1.0), 8, passes=1)
    everything = load_corpus(lines, tokenizer, tokens=200 * WINDOW, window=WINDOW)
    assert (len(text.windows), len(held.windows)) == (8, texts.DECIDING_WINDOWS)
    seeded = {tuple(ids) for ids in everything.windows[: 4 * 8].tolist()}  # the seed draws from so many
    assert {tuple(ids) for ids in text.windows.tolist()} < seeded
    wanted = everything.windows[first : first + texts.SPREAD * texts.DECIDING_WINDOWS : texts.SPREAD]
    assert torch.equal(held.windows, wanted)


def test_text_of_a_few_windows_is_refused(writer):
    made, _, _ = writer
    with pytest.raises(DataError, match="has only 1024 tokens in whole windows; 2048 are needed"):
        made.training(Share("list", [TEXT[:1100]], 1.0), 100, passes=1)


def test_deciding_and_training_texts_share_no_conversation(writer):
    made, _, tokenizer = writer
    deciding, seconds = made.deciding()
    trained = [made.training(Share(text.name, "chat", 0.5), 8, passes=1)[0] for text in deciding]
    assert set(seconds) == {"conversations", "questions"}
    items = [
        {number for ids in text.windows for number in re.findall(r"Is (\d+) even", tokenizer.decode(ids))}
        for text in (*deciding, *trained)
    ]
    assert all(items)
    assert len(set().union(*items)) == sum(map(len, items))


def test_a_window_without_an_answer_is_left_out():
    asked = [Conversation([*range(40)], [False] * 40), Conversation([*range(20)], [False] * 10 + [True] * 10)]
    rows = [*texts._packed([asked[0], asked[0], asked[1], asked[1], asked[0]], 32)]
    assert rows == [([*range(20), *range(12)], [False] * 10 + [True] * 10 + [False] * 10 + [True] * 2)]


def test_prompts_as_long_as_a_window_ask_for_a_longer_one(writer):
    made, _, tokenizer = writer
    short = texts.Writer(MODEL, tokenizer, 8, Run(seed=3))
    with pytest.raises(DataError, match="The prompts of questions fill a window of 8 tokens.*Set a longer window"):
        short.training(Share("questions", "chat", 1.0), 4, passes=1)


def test_a_model_that_does_not_converse_is_decided_on_plain_text(writer, monkeypatch):
    made, _, _ = writer

    def refuse(*_args, **_kwargs):
        raise DataError("It wrote nothing.")

    monkeypatch.setitem(texts.CHATS, "questions", refuse)
    assert [text.name for text in made.deciding()[0]] == ["conversations"]
    monkeypatch.setitem(texts.CHATS, "conversations", refuse)
    monkeypatch.setattr(texts, "load_corpus", lambda *_args, **_given: Corpus.of("self", torch.ones(3, WINDOW).long()))
    decided, seconds = texts.Writer(MODEL, chat_tokenizer(), WINDOW, Run(seed=4)).deciding()
    assert [text.name for text in decided] == [*seconds] == ["self"]


def test_texts_are_kept(writer):
    made, script, _ = writer
    first, _ = made.training(Share("questions", "chat", 1.0), 4, passes=1)
    calls = len(script.calls)
    again, _ = made.training(Share("questions", "chat", 1.0), 4, passes=1)
    assert len(script.calls) == calls
    assert torch.equal(first.windows, again.windows)
    assert torch.equal(first.counted, again.counted)
    assert first.record(9)["tokens_read"] == 9 * WINDOW


def test_what_is_kept_leaves_what_follows_the_same(writer, tmp_path):
    """A run that is resumed after its first text drops the same near-duplicates from the next one."""
    made, script, tokenizer = writer
    _, timed = made.deciding()
    assert all(timed.values())
    resumed = texts.Writer(MODEL, tokenizer, WINDOW, Run(checkpoints=Checkpoints(tmp_path), seed=3))
    assert resumed.deciding()[1] == pytest.approx(timed)  # the seconds of the run that wrote it
    assert resumed._distinct.texts == made._distinct.texts
    assert len(made._distinct.texts) > 20
    script._questions = iter([made._distinct.texts[0], "Is this new?", *ASKED[2000:]])
    text, _ = resumed.training(Share("conversations", "chat", 1.0), 2, passes=1)
    said = "".join(tokenizer.decode(ids) for ids in text.windows)
    assert "Is this new?" in said
    assert said.count(made._distinct.texts[0]) == 0
