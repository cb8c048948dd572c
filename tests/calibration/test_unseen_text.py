"""The text on which the gain of a search is measured: nothing else has read it."""

from dataclasses import replace

import pytest
import torch
from support.chatting import chat_tokenizer
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.calibration import corpus as corpora
from selfpruner_hub.calibration.conversations import Conversation
from selfpruner_hub.calibration.corpus import Corpus, load_corpus
from selfpruner_hub.calibration.texts import Texts
from selfpruner_hub.errors import DataError
from selfpruner_hub.search import find_plan
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

WINDOW, CALIBRATION, FITNESS = 8, 8, 4
SIZES = {"window": WINDOW, "calibration_tokens": WINDOW * CALIBRATION, "fitness_tokens": WINDOW * FITNESS}
SETTINGS, UNSEARCHED = (resolve(None, evaluations=evaluations, **SIZES) for evaluations in (10, 0))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture
def text(tmp_path):
    """A function: a file whose windows tell where they stood, and begin with a letter."""

    def file(windows, letter="0"):
        path = tmp_path / f"{letter}.txt"
        path.write_text("".join(f"{letter}{i:07d}" for i in range(windows)))
        return str(path)

    return file


@pytest.fixture
def sampled(monkeypatch):
    """Number of windows that the model wrote, by call."""
    counts = []
    sample = corpora.sample_windows

    def spy(*arguments, count, **keywords):
        counts.append(count)
        return sample(*arguments, count=count, **keywords)

    monkeypatch.setattr(corpora, "sample_windows", spy)
    return counts


def places(text):
    return [] if text is None else [int("".join(map(chr, row[1:]))) for row in text.windows.tolist()]


def read(model, data, settings=SETTINGS, run=None):
    return Texts(model, tiny_tokenizer()).read(data, settings, run or Run())


def test_it_is_a_stretch_behind_the_others_which_are_the_same_without_it(model, text):
    found = read(model, text(100))
    calibration, search, unseen = map(places, found)
    assert sorted(unseen) == [48, 49, 50, 51]  # behind four times as much as the others have
    assert max(calibration) < min(search) < 48
    without = read(model, text(100), UNSEARCHED)
    assert without.unseen is None
    assert [places(part) for part in without[:2]] == [calibration, search]


@pytest.mark.parametrize(
    ("windows", "sizes", "unsearched"),
    [
        (100, (8, 4, 4), (8, 4)),
        (16, (8, 4, 4), (8, 4)),
        (15, (8, 4, 3), (8, 4)),
        (13, (8, 4, 1), (8, 4)),
        (12, (8, 3, 1), (8, 4)),  # none is left: the search gives some of its own
        (9, (6, 2, 1), (6, 3)),
        (6, (4, 1, 1), (4, 2)),
    ],
)
def test_a_short_text_has_one_too(windows, sizes, unsearched, model, text):
    found = [sorted(places(part)) for part in read(model, text(windows))]
    assert tuple(map(len, found)) == sizes
    assert sum(found, []) == sorted(set(sum(found, [])))  # one stretch after another
    assert tuple(len(places(part)) for part in read(model, text(windows), UNSEARCHED)[:2]) == unsearched


def test_one_window_is_for_the_search(model, text):
    found = read(model, text(9), replace(SETTINGS, fitness_tokens=WINDOW))
    assert [len(places(part)) for part in found] == [8, 1, 0]
    assert found.unseen is None


def test_every_source_gives_its_share(model, text):
    found = read(model, f"{text(100, 'A')}+{text(100, 'B')}+self", replace(SETTINGS, shares=(2, 1, 1)))
    kinds = ["".join(chr(row[0]) if chr(row[-1]).isdigit() and row[0] in b"AB" else "?" for row in t.windows.tolist())
             for t in found]  # fmt: skip
    assert [tuple(kind.count(c) for c in "AB?") for kind in kinds] == [(4, 2, 2), (2, 1, 1), (2, 1, 1)]
    assert found.unseen.name == "A.txt and B.txt and self"


def test_what_the_model_writes_is_written_for_a_search_alone(model, sampled):
    without = read(model, "self", UNSEARCHED)
    assert sampled == [CALIBRATION + FITNESS]
    found = read(model, "self")
    assert sampled[1:] == [CALIBRATION + FITNESS, FITNESS]
    assert [part.sha256 for part in found[:2]] == [part.sha256 for part in without[:2]]
    rows = [{tuple(row) for row in part.windows.tolist()} for part in found]
    assert len(set.union(*rows)) == sum(map(len, rows)) == CALIBRATION + 2 * FITNESS


@pytest.mark.parametrize("kept", ["in memory", "in a directory"])
def test_text_of_a_run_without_a_search_is_not_enough_for_one(kept, model, sampled, tmp_path):
    run = Run(checkpoints=Checkpoints(tmp_path))
    known = Texts(model, tiny_tokenizer())
    known.read("self", UNSEARCHED, run)
    found = (known if kept == "in memory" else Texts(model, tiny_tokenizer())).read("self", SETTINGS, run)
    assert sampled == [CALIBRATION + FITNESS, CALIBRATION + FITNESS, FITNESS]
    assert [len(part.windows) for part in found] == [CALIBRATION, FITNESS, FITNESS]


def test_it_is_written_once(model, sampled, tmp_path):
    known, run = Texts(model, tiny_tokenizer()), Run(checkpoints=Checkpoints(tmp_path))
    first = known.read("self", SETTINGS, run)
    for settings in (SETTINGS, UNSEARCHED):
        assert [part.sha256 for part in known.read("self", settings, run)[:2]] == [part.sha256 for part in first[:2]]
    assert known.read("self", SETTINGS, run).unseen.sha256 == first.unseen.sha256
    assert read(model, "self", run=run).unseen.sha256 == first.unseen.sha256
    assert len(sampled) == 2


@pytest.mark.parametrize("ends", [False, True])
def test_no_question_of_a_conversation_is_asked_in_it_again(ends, model, monkeypatch):
    asked = []

    def write(model, tokenizer, count, seed, *, distinct, progress):
        if ends and asked:
            raise DataError("The model only repeats itself.")
        asked.append((seed, distinct))
        return [Conversation((len(asked),) * WINDOW, (True,) * WINDOW)] * count

    monkeypatch.setattr(corpora, "write_conversations", write)
    monkeypatch.setattr(corpora, "CONVERSATION_TOKENS", WINDOW)
    corpus = load_corpus("chat", chat_tokenizer(), tokens=WINDOW * 6, spare=WINDOW * 2, window=WINDOW, model=model)
    assert corpus.windows[:, 0].tolist() == [1] * 6 + ([] if ends else [2] * 2)
    assert len({seed for seed, _ in asked}) == len(asked) == 2 - ends
    assert len({id(distinct) for _, distinct in asked}) == 1


def test_the_gain_is_measured_on_it(model, monkeypatch):
    scored = []

    class Spy(find_plan.Fitness):
        def __init__(self, slicer, windows, *more):
            super().__init__(slicer, windows, *more)
            self.found = {}
            scored.append((windows, self.found))

        def __call__(self, plan, share=1.0):
            self.found[plan, share] = super().__call__(plan, share)
            return self.found[plan, share]

    monkeypatch.setattr(find_plan, "Fitness", Spy)
    small = {"data": "self", "proposer": "evolution", "window": 32, "seeds": ("uniform",), "progress": False}
    small |= {"calibration_tokens": 1024, "fitness_tokens": 256, "repair": "output"}  # scores are measurements
    report = AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(0.3, evaluations=4, **small).report
    (searched, on_own), (unseen, on_unseen) = scored
    assert Corpus.of("", searched).sha256 == report.data["fitness"]["sha256"]
    assert Corpus.of("", unseen).sha256 == report.data["unseen"]["sha256"]
    assert report.proposer["gains"]["unseen_text"][1] == pytest.approx(on_unseen[report.plan, 1.0], abs=1e-6)
    assert report.proposer["gains"]["search_text"][1] == pytest.approx(on_own[report.plan, 1.0], abs=1e-6)
    scored.clear()
    report = AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(0.3, evaluations=0, **small).report
    assert len(scored) == 1
    assert (set(report.data), set(report.proposer["gains"])) == ({"calibration", "fitness"}, {"search_text"})
    assert torch.equal(scored[0][0], searched[: round(len(searched) / 4)])  # enough to choose among seeds
