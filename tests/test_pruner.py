"""What `AutoPruner` decides itself: which text goes into calibration and fitness."""

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.errors import DataError
from selfpruner_hub.provenance import describe

WINDOW, CALIBRATION, FITNESS = 32, 20, 8


@pytest.fixture
def article(tmp_path):
    """A text of capital As alone, which a random model does not write."""
    path = tmp_path / "article.txt"
    path.write_text("A" * WINDOW * (CALIBRATION + FITNESS))
    return str(path)


@pytest.fixture
def texts(monkeypatch):
    """Prune, and give the record and the windows that were calibrated and scored on."""
    found = []

    def spy(*arguments):
        found[:] = next(each for each in arguments if isinstance(each, tuple) and isinstance(each[0], Corpus))[:2]
        return describe(*arguments)

    monkeypatch.setattr("selfpruner_hub.pruner.describe", spy)

    def prune(data, **settings):
        made = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
            0.3, data=data, proposer="evolution", window=WINDOW, calibration_tokens=WINDOW * CALIBRATION,
            fitness_tokens=WINDOW * FITNESS, evaluations=0, progress=False, **settings,
        )  # fmt: skip
        return made.report, [text.windows for text in found]

    return prune


def of_article(windows):
    return [bool((window == ord("A")).all()) for window in windows]


@pytest.mark.parametrize(("share", "own"), [(0, (0, 0)), (0.25, (5, 2)), (1, (20, 8))])
def test_a_share_of_both_texts_is_the_models_own(share, own, article, texts):
    record, found = texts(article, own_text=share)
    assert [len(windows) for windows in found] == [CALIBRATION, FITNESS]
    assert tuple(of_article(windows).count(False) for windows in found) == own
    names = [name for name, part in (("article.txt", 1 - share), ("self", share)) if part]
    assert record.data["calibration"]["name"] == " and ".join(names)
    assert record.method["own_text"] == share


def test_the_first_windows_are_of_both(article, texts):
    _, (calibration, _) = texts(article, own_text=0.5)
    assert set(of_article(calibration[: CALIBRATION // 2])) == {True, False}


def test_no_window_that_the_model_wrote_is_in_both_texts(article, texts):
    _, found = texts(article, own_text=0.5)
    own = [{tuple(row) for row in windows.tolist() if set(row) != {ord("A")}} for windows in found]
    assert not own[0] & own[1]


def test_a_model_alone_needs_no_share(texts):
    record, (first, _) = texts("self")
    _, (again, _) = texts("self", own_text=0.25)
    assert torch.equal(first, again)
    assert record.data["calibration"]["name"] == "self"


def test_a_text_too_short_is_too_short_with_a_share_too(tmp_path, texts):
    (tmp_path / "short.txt").write_text("A" * WINDOW * 5)
    with pytest.raises(DataError, match="are needed"):
        texts(str(tmp_path / "short.txt"), own_text=0.25)
