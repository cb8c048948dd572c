"""Corpus: exact counts, disjoint windows that the seed decides, and one clear line for a text that cannot be used."""

import hashlib
import json
from dataclasses import replace
from functools import partial

import datasets
import pytest
import torch
from support.chat import Writer, assistant, chat_tokenizer, user
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.calibration import conversations, generated_text
from selfpruner_hub.calibration import corpus as corpora
from selfpruner_hub.calibration.chat_template import conversation_ids
from selfpruner_hub.calibration.conversations import packed
from selfpruner_hub.calibration.corpus import CONVERSATION_ATTEMPTS, Corpus, consecutive_windows, load_corpus
from selfpruner_hub.calibration.text_sources import sources_of
from selfpruner_hub.errors import DataError

WINDOW = 8
TOKENIZER = tiny_tokenizer()
SPECIAL = {0, 1, 2}


def numbered(windows):
    """A text whose windows of eight tokens are 00000000, 00000001, …: each window tells where it stood."""
    return "".join(f"{i:08d}" for i in range(windows))


def places(corpus):
    return [int("".join(map(chr, row))) for row in corpus.windows.tolist()]


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.fixture
def text(tmp_path):
    return written(tmp_path / "text.txt", numbered(200))


def draw(source, tokens=80, **kwargs):
    return load_corpus(source, TOKENIZER, tokens=tokens, window=WINDOW, **kwargs)


def assert_one_line_with_remedy(error):
    assert "\n" not in str(error)
    assert error.hint


@pytest.mark.parametrize(("asked", "given"), [(80, 80), (81, 88), (1, 8)])
def test_tokens_are_rounded_up_to_whole_windows(asked, given, text):
    corpus = draw(text, asked)
    assert corpus.tokens == given
    assert corpus.windows.shape == (given // WINDOW, WINDOW)
    assert corpus.windows.dtype == torch.int64


def test_windows_are_disjoint_pieces_of_the_text(text):
    found = places(draw(text))
    assert len(set(found)) == 10
    assert set(found) <= set(range(40))  # of the first four times as much as was asked for


def test_the_seed_decides_the_windows(text):
    assert places(draw(text, seed=3)) == places(draw(text, seed=3))
    assert sorted(places(draw(text, seed=3))) != sorted(places(draw(text, seed=4)))


def test_the_hash_is_that_of_the_tokens(text):
    corpus = draw(text)
    assert corpus.sha256 == hashlib.sha256(corpus.windows.numpy().tobytes()).hexdigest()
    assert corpus.sha256 == draw(text).sha256 != draw(text, seed=1).sha256
    columns_first = corpus.windows.T.contiguous().T
    assert Corpus.of("the same", columns_first).sha256 == corpus.sha256


def test_the_record_names_the_file_without_its_folder(text):
    corpus = draw(text)
    assert corpus.record() == {"name": "text.txt", "tokens": 80, "window": WINDOW, "sha256": corpus.sha256}


def test_jsonl_is_a_text_per_line(tmp_path, text):
    whole = numbered(200)
    lines = [json.dumps({"text": whole[:500], "id": 1}), "", json.dumps({"text": whole[500:]}), ""]
    assert places(draw(written(tmp_path / "a.jsonl", "\n".join(lines)))) == places(draw(text))


def test_jsonl_strings_may_hold_line_breaks_of_unicode(tmp_path):
    text = "ab\u2028\x85cdefgh"
    path = written(tmp_path / "a.jsonl", json.dumps({"text": text}, ensure_ascii=False))
    read = consecutive_windows(path, TOKENIZER, WINDOW, count=1).windows[0].tolist()
    assert read == TOKENIZER(text)["input_ids"][:WINDOW]


def test_a_byte_order_mark_is_not_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + numbered(1).encode())
    assert places(draw(str(tmp_path / "a.txt"), tokens=8)) == [0]


# A bug once: windows were drawn from everywhere for both parts, so the fitness saw the articles of the calibration.
def test_split_gives_each_part_a_stretch_of_the_text(text):
    corpus = draw(text)
    assert places(corpus) == sorted(places(corpus))
    first, second = corpus.split(48, 32)
    assert (first.tokens, second.tokens) == (48, 32)
    assert sorted(places(first)) + sorted(places(second)) == places(corpus)
    assert places(first) == places(corpus.split(48, 32)[0])
    assert any(places(corpus.split(48, 32, seed=s)[0]) != places(first) for s in range(1, 4))
    assert first.sha256 != second.sha256
    assert [part.tokens for part in corpus.split(1, 17)] == [8, 16]  # whole windows, at least one each


def test_mixed_texts_lose_no_window_and_the_first_stand_for_all(text):
    first, second = draw(text).split(40, 40)
    mixed = Corpus.mixed([first, second])
    assert sorted(places(mixed)) == sorted(places(first) + places(second))
    assert mixed.name == "text.txt and text.txt"
    assert {place in places(first) for place in places(mixed)[:5]} == {True, False}
    assert places(mixed) == places(Corpus.mixed([first, second]))
    assert any(places(mixed) != places(Corpus.mixed([first, second], seed)) for seed in (1, 2))
    assert Corpus.mixed([first]) is first


def test_split_of_too_few_windows(text):
    with pytest.raises(DataError, match=r"80 tokens.* 88 are needed") as caught:
        draw(text).split(48, 40)
    assert_one_line_with_remedy(caught.value)


@pytest.mark.parametrize(("windows", "asked"), [(5, 10), (2, 3), (1, 1)])
def test_half_of_the_tokens_is_enough(windows, asked, tmp_path):
    path = written(tmp_path / "short.txt", numbered(windows))
    assert sorted(places(draw(path, asked * WINDOW))) == list(range(windows))


@pytest.mark.parametrize(("content", "asked"), [("", 8), ("0123456789", 80), (numbered(4), 80), (numbered(1), 24)])
def test_too_little_text_says_what_there_is_and_what_is_needed(content, asked, tmp_path):
    with pytest.raises(DataError, match=rf"only {len(content)} tokens .*; {asked} are needed") as caught:
        draw(written(tmp_path / "short.txt", content), asked)
    assert_one_line_with_remedy(caught.value)


@pytest.mark.parametrize("source", ["wikitext3", "text.pdf", "", "in/self", "in/chat", "It was so. " * 500])
def test_an_unknown_source_names_the_known_ones(source):
    known = r"wikitext2, c4, chat, self, several with \+ between them, or a path to a \.txt or \.jsonl"
    with pytest.raises(DataError, match=known) as caught:
        draw(source)
    assert_one_line_with_remedy(caught.value)


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"nothing\.txt.*No such file"):
        draw("nothing.txt")


def test_a_folder_is_no_text(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt.*directory"):
        draw(str(tmp_path / "folder.txt"))


def test_a_file_that_is_not_utf8(tmp_path):
    (tmp_path / "latin.txt").write_bytes("fünf".encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        draw(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', '{"txt": "a"}', '{"text": 5}', '{"text": null}'])
def test_a_bad_jsonl_line_is_named(line, tmp_path):
    path = written(tmp_path / "bad.jsonl", f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, line 3: "):
        draw(path)


def test_text_needs_a_tokenizer_and_self_needs_the_model(text):
    with pytest.raises(DataError, match="tokenizer"):
        load_corpus(text, None, tokens=8, window=WINDOW)
    for source in ("self", "chat"):
        with pytest.raises(DataError, match="model"):
            load_corpus(source, None, tokens=8, window=WINDOW)


@pytest.mark.parametrize("source", ["wikitext2", "c4"])
def test_no_network_is_one_line_with_a_remedy(source):
    with pytest.raises(DataError, match=r'Cannot load .* from the Hugging Face Hub .* data="self"') as caught:
        draw(source)
    assert_one_line_with_remedy(caught.value)


def test_pruning_reads_the_train_split_and_measuring_the_test_split(monkeypatch):
    asked = []

    def load_dataset(repo, name, split, streaming):
        asked.append((repo, split))
        return [{"text": numbered(20)}] * 3

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert draw("wikitext2").name == "wikitext2"
    assert consecutive_windows("wikitext2", TOKENIZER, WINDOW).tokens == 3 * 160
    assert consecutive_windows("c4", TOKENIZER, WINDOW, count=2).name == "c4 test split"
    assert asked == [("Salesforce/wikitext", "train"), ("Salesforce/wikitext", "test"), ("allenai/c4", "validation")]


def test_of_c4_some_windows_are_enough(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": numbered(100)}] * 3)
    assert len(consecutive_windows("c4", TOKENIZER, WINDOW).windows) == 256
    assert len(consecutive_windows("c4", TOKENIZER, WINDOW, count=300).windows) == 300


def test_the_model_samples_its_own_text(monkeypatch):
    monkeypatch.setattr(generated_text, "SAMPLE_BATCH", 64)
    model = tiny_model("llama")
    corpus = load_corpus("self", None, tokens=70 * WINDOW, window=WINDOW, model=model)  # two batches of sampling
    assert corpus.name == "self"
    assert corpus.windows.shape == (70, WINDOW)
    assert not SPECIAL & set(corpus.windows.flatten().tolist())
    assert len(set(map(tuple, corpus.windows.tolist()))) > 60


def test_consecutive_windows_keep_their_order_and_leave_the_rest_out(tmp_path):
    path = written(tmp_path / "a.txt", numbered(6) + "123")
    corpus = consecutive_windows(path, TOKENIZER, WINDOW)
    assert places(corpus) == list(range(6))
    assert corpus.name == "a.txt"
    assert places(consecutive_windows(path, TOKENIZER, WINDOW, count=2)) == [0, 1]


def test_consecutive_windows_of_any_width_are_all_there_are(tmp_path):
    path = written(tmp_path / "a.txt", numbered(8 * 50))
    assert consecutive_windows(path, TOKENIZER, 64).windows.shape == (50, 64)
    assert consecutive_windows(path, TOKENIZER, 1600).windows.shape == (2, 1600)


@pytest.mark.parametrize(
    ("window", "count", "said"),
    [
        (WINDOW, 7, "51 tokens .* 56 are needed"),
        (52, None, "51 tokens .* 52 are needed"),
        (1, None, "at least 2"),
        (WINDOW, 0, "at least one"),
    ],
)
def test_consecutive_windows_of_too_little_text(window, count, said, tmp_path):
    path = written(tmp_path / "a.txt", numbered(6) + "123")
    with pytest.raises(DataError, match=said):
        consecutive_windows(path, TOKENIZER, window, count)


def test_a_measurement_needs_a_tokenizer_and_a_text_of_others(text):
    with pytest.raises(DataError, match="tokenizer"):
        consecutive_windows(text, None, WINDOW)
    for source in ("self", "chat"):
        with pytest.raises(DataError, match="did not write") as caught:
            consecutive_windows(source, TOKENIZER, WINDOW)
        assert source not in caught.value.hint


CHAT = chat_tokenizer("gemma")
TALKS = [[user(f"What is {i}?"), assistant(f"A number, {i * i}.")] for i in range(60)]
WRITTEN = [conversation_ids(CHAT, talk) for talk in TALKS]


def chat_windows(source, tokens=20 * 24, **more):
    return load_corpus(source, CHAT, tokens=tokens, window=24, **more).windows.tolist()


@pytest.mark.parametrize("kind", ["list", "objects", "data set", "file"])
def test_conversations_of_a_user_are_packed_as_the_template_writes_them(kind, tmp_path):
    objects = [{"messages": talk} for talk in TALKS]
    source = {
        "list": TALKS,
        "objects": objects,
        "data set": datasets.Dataset.from_list(objects),
        "file": written(tmp_path / "mine.jsonl", "\n".join(map(json.dumps, objects))),
    }[kind]
    whole = packed(WRITTEN, 24).tolist()
    assert len(whole) == 60  # a conversation is longer than a window
    found = chat_windows(source)
    assert len(found) == 20
    assert [row for row in whole if row in found] == found  # in their order
    assert chat_windows(source, seed=1) != found
    assert consecutive_windows(source, CHAT, 24).windows.tolist() == whole if kind == "file" else True


def test_texts_of_a_list():
    items = [numbered(100), {"text": "".join(f"{i:08d}" for i in range(100, 200))}]
    corpus = draw(items)
    assert corpus.name == "list"
    assert set(places(corpus)) <= set(range(40))
    assert len(corpus.windows) == 10


@pytest.mark.parametrize("items", [["A text.", *TALKS], [*TALKS, "A text."]], ids=["text first", "text last"])
def test_texts_and_conversations_do_not_mix(items):
    with pytest.raises(DataError, match="mixed in one source") as caught:
        chat_windows(items, tokens=10_000)
    assert_one_line_with_remedy(caught.value)


def test_conversations_need_a_template():
    with pytest.raises(DataError, match="Conversations need a tokenizer with a chat template") as caught:
        draw(TALKS)
    assert_one_line_with_remedy(caught.value)
    with pytest.raises(DataError, match='data="chat" needs a tokenizer with a chat template') as caught:
        draw("chat", model=tiny_model("llama"))
    assert_one_line_with_remedy(caught.value)


def test_too_few_conversations():
    with pytest.raises(DataError, match="'list' has only 72 tokens in whole windows; 240 are needed"):
        chat_windows(TALKS[:3], tokens=240)
    with pytest.raises(DataError, match="data is a list without entries"):
        chat_windows([], tokens=240)


@pytest.fixture
def write(monkeypatch):
    """Let a script write `chat`; gives the corpus and the writer."""

    def write(questions, tokens, window, *, style="gemma", answer="Yes.", **more):
        tokenizer = chat_tokenizer(style)
        writer = Writer(tokenizer, questions, lambda _: answer)
        monkeypatch.setattr(conversations, "continuations", writer)
        plain = partial(conversations.write_conversations, style=replace(conversations.CHAT, openings=("",)))
        monkeypatch.setattr(corpora, "write_conversations", plain)
        model = tiny_model("llama")
        return load_corpus("chat", tokenizer, tokens=tokens, window=window, model=model, **more), writer

    return write


@pytest.mark.parametrize("window", [16, 32, 128, 512])
@pytest.mark.parametrize("style", ["gemma", "chatml"])
def test_written_conversations_fill_windows_of_any_width(window, style, write):
    """Those of Gemma's style have 40 tokens or so here, those of ChatML's up to 150."""
    corpus, _ = write((f"Is {i} even?" for i in range(100_000)), 40 * window, window, style=style)
    assert corpus.name == "chat"
    assert corpus.windows.shape == (40, window)
    begins = {"gemma": "<s><start_of_turn>user\nIs ", "chatml": "<|im_start|>system\nYou "}[style]
    tokenizer = chat_tokenizer(style)
    assert all(tokenizer.decode(row).startswith(begins) for row in corpus.windows)
    assert len(set(map(tuple, corpus.windows.tolist()))) == 40 or window < 64


def test_no_conversation_is_written_twice(write):
    questions = [f"Is {i // 3} even?" for i in range(1000)]  # each three times
    corpus, _ = write(questions, 20 * 64, 64)
    text = "".join(CHAT.decode(row) for row in corpus.windows)
    assert all(text.count(f"Is {i} even?") <= 1 for i in range(400))


@pytest.mark.parametrize("seed", [0, 5])
def test_each_attempt_has_a_seed_of_its_own(seed, write):
    questions = (f"Is {i} even?" if i % 9 == 0 else None for i in range(100_000))
    _, writer = write(questions, 40 * 64, 64, seed=seed)
    seeds = [call["seed"] for call in writer.of("answers")]
    assert len(set(seeds)) == len(seeds) > 1
    assert seeds == list(range(CONVERSATION_ATTEMPTS * seed, CONVERSATION_ATTEMPTS * seed + len(seeds)))


def test_a_model_that_repeats_itself_writes_too_little(write):
    with pytest.raises(DataError, match=r"none that is new") as caught:
        write(["Who are you?"] * 100_000, 64 * 64, 64)
    assert_one_line_with_remedy(caught.value)


@pytest.mark.parametrize("more", [26, 5])
def test_half_of_the_written_text_is_enough(more, write):
    """A window holds two conversations; the model writes none after the first `more`."""
    questions = [f"Is {i} even?" for i in range(more)]
    if more < 20:
        with pytest.raises(DataError):
            write(questions, 20 * 64, 64)
    else:
        assert 10 <= len(write(questions, 20 * 64, 64)[0].windows) < 20


def test_what_is_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "a+b.txt", "text")
    assert sources_of("chat") == ["chat"]
    assert sources_of("chat+wikitext2") == ["chat", "wikitext2"]
    assert sources_of("self+chat+self") == ["self", "chat"]
    assert sources_of("a+b.txt") == ["a+b.txt"]
    assert sources_of("chat+mine.jsonl") == ["chat", "mine.jsonl"]
    assert sources_of(tmp_path) == [tmp_path]
    assert sources_of(TALKS) == [TALKS]
    long = "Once upon a time, " * 300
    assert sources_of(long) == [long]
