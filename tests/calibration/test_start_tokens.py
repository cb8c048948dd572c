"""Text as the model reads it: each window begins with what the tokenizer puts before a text, which nothing counts."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.calibration.corpus import Corpus, consecutive_windows, load_corpus
from selfpruner_hub.calibration.text_sources import start_ids
from selfpruner_hub.calibration.texts import Texts
from selfpruner_hub.errors import DataError
from selfpruner_hub.evaluation.figures import text_figures
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

STARTS = {"": [], "<s>": [1], "<pad> <s>": [0, 1]}
TEXT = "".join(f"{i:08d}" for i in range(60))
IDS = [ord(character) for character in TEXT]


@pytest.fixture(params=STARTS)
def start(request):
    return request.param, STARTS[request.param]


def with_start(ids, window, start):
    """The windows worked out by hand."""
    step = window - len(start)
    return [[*start, *ids[i : i + step]] for i in range(0, len(ids) - step + 1, step)]


def test_what_a_tokenizer_puts_before_a_text(start):
    assert start_ids(tiny_tokenizer(start[0])) == start[1]
    assert start_ids(None) == []


def test_windows_for_a_measurement(start, tmp_path):
    """Without a start they are those of the text alone."""
    (tmp_path / "text.txt").write_text(TEXT)
    corpus = consecutive_windows(str(tmp_path / "text.txt"), tiny_tokenizer(start[0]), 16)
    assert corpus.windows.tolist() == with_start(IDS, 16, start[1])
    assert corpus.start == len(start[1])


def test_windows_for_pruning(start):
    expected = with_start(IDS, 16, start[1])
    corpus = load_corpus([TEXT], tiny_tokenizer(start[0]), tokens=16 * len(expected), window=16)
    assert corpus.windows.tolist() == expected


def test_windows_that_the_model_writes(start):
    corpus, plain = (
        load_corpus("self", tokenizer, tokens=64, window=16, model=tiny_model("llama"))
        for tokenizer in (tiny_tokenizer(start[0]), None)
    )
    assert corpus.windows.shape == (4, 16)
    assert all(row[: len(start[1])] == start[1] for row in corpus.windows.tolist())
    assert not torch.isin(corpus.windows[:, len(start[1]) :], torch.tensor([0, 1, 2])).any()
    assert torch.equal(corpus.windows, plain.windows) == (not start[1])
    if start[1] == [1]:  # the model's own start token: the text after it is the same
        assert torch.equal(corpus.windows[:, 1:], plain.windows[:, :-1])


@pytest.mark.parametrize("data", ["self", [TEXT]])
def test_all_texts_of_a_run_begin_so(data, tmp_path):
    settings = resolve("default", window=16, calibration_tokens=64, fitness_tokens=32, evaluations=1)
    run = Run(checkpoints=Checkpoints(tmp_path))
    for tokens, expected in (("<s>", True), ("", False)):  # text that was written with a start is not taken without
        texts = Texts(tiny_model("llama"), tiny_tokenizer(tokens)).read(data, settings, run)
        assert [bool((text.windows[:, 0] == 1).all()) for text in texts] == [expected] * 3


def test_the_perplexity_counts_no_prediction_of_a_start(start):
    model, tokens = tiny_model("llama"), tiny_tokenizer(start[0])
    windows = torch.tensor(with_start(IDS, 16, start[1]))
    metric = text_figures(model, Corpus.of("text", windows, len(start_ids(tokens))))["perplexity (16)"]
    with torch.no_grad():
        logs = model(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])[..., 0]
    text = logs[:, max(0, len(start[1]) - 1) :]
    assert metric.value == pytest.approx((-text.mean()).exp().item(), rel=1e-4)
    assert ("begun as the tokenizer begins a text" in metric.protocol) == bool(start[1])


def test_a_window_without_room_for_text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    tokenizer = tiny_tokenizer("<pad> <s>")
    with pytest.raises(DataError, match="A window of 2 tokens has no room for text after the 2 of its start"):
        consecutive_windows(str(tmp_path / "text.txt"), tokenizer, 2)
    with pytest.raises(DataError, match="no room"):
        load_corpus([TEXT], tokenizer, tokens=8, window=2)
