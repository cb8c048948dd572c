"""`selfpruner evaluate` of a tiny chat model: what is left of its answers, beside its parent."""

from __future__ import annotations

import json
import random
import shutil

import pytest
from support.chatting import chat_tokenizer, save_chat
from support.tiny import save_tiny, tiny_model

from selfpruner_hub.cli import main
from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation import chat, figures, questions
from selfpruner_hub.evaluation.figures import AGREEMENT, ANSWERED, CHAT_FIGURES, DIVERGENCE, KEPT
from selfpruner_hub.evaluation.questions import load_questions
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.model_record import read_record

TEXT = ["perplexity (32)", "KL (32)"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A dense chat model, a pruned one, and a text."""
    work = tmp_path_factory.mktemp("chat")
    save_chat(work / "dense")
    pruner = AutoPruner(tiny_model("llama", max_position_embeddings=1024), chat_tokenizer(), "tests/llama")
    pruner.prune(
        0.3, data="self", proposer="evolution", window=32, calibration_tokens=512, fitness_tokens=128,
        evaluations=0, seeds=("uniform",), progress=False,
    ).save_pretrained(work / "pruned")  # fmt: skip
    (work / "text.txt").write_text("".join(random.Random(0).choices("abcdefgh ", k=400)))
    return work


@pytest.fixture
def evaluate(work, capsys, monkeypatch):
    """Evaluate with few conversations and questions, and give back the figures; the first questions are all right."""
    few = load_questions("report")[:6]
    monkeypatch.setattr(chat.ChatMeasure.__init__, "__defaults__", (4, chat.SEED, None))
    monkeypatch.setattr(questions, "load_questions", lambda half: few if half == "report" else None)
    monkeypatch.setattr(questions.PlainQuestion, "is_right", lambda self, reply: self in few[:3])

    def evaluate(model, *words):
        data = ["--data", str(work / "text.txt"), "--window", "32", "--quiet", "--json"]
        assert main(["evaluate", str(model), *data, *map(str, words)]) == 0
        return json.loads(capsys.readouterr().out)["metrics"]

    return evaluate


def test_beside_the_parent_and_saved(work, evaluate):
    found = evaluate(work / "pruned", "--against", work / "dense", "--save")
    assert set(found) == {*CHAT_FIGURES, *TEXT}
    assert (found[ANSWERED]["value"], found[ANSWERED]["dense"]) == (0.5, 0.5)
    assert (found[KEPT]["value"], found[KEPT]["dense"]) == (1.0, None)
    assert found[DIVERGENCE]["dense"] is None
    assert found[DIVERGENCE]["value"] > 0
    assert found["KL (32)"]["dense"] is None
    assert all(0 <= found[AGREEMENT][which] <= 1 for which in ("value", "dense"))
    assert "4 conversations" in found[AGREEMENT]["protocol"]
    assert str(work) not in json.dumps(found)
    record = read_record(work / "pruned")
    assert record.metrics[KEPT].value == 1.0
    card = (work / "pruned" / "README.md").read_text()
    assert "Of the plain questions that its parent answers, it answers 100 %." in " ".join(card.split())
    assert f"| {ANSWERED} | 0.5 | 0.5 |" in card


def test_the_parent_itself(work, evaluate):
    found = evaluate(work / "dense", "--against", work / "dense")
    assert found[DIVERGENCE]["value"] == pytest.approx(0, abs=1e-3)
    assert found[AGREEMENT]["value"] == found[AGREEMENT]["dense"]
    assert found["KL (32)"]["value"] == pytest.approx(0, abs=1e-3)


def test_what_needs_no_parent(work, evaluate):
    assert set(evaluate(work / "dense")) == {ANSWERED, "perplexity (32)"}
    assert set(evaluate(work / "dense", "--no-chat")) == {"perplexity (32)"}
    assert set(evaluate(work / "pruned", "--no-chat", "--against", work / "dense")) == set(TEXT)


def test_a_base_model_has_no_chat(work, evaluate, tmp_path):
    assert set(evaluate(save_tiny("llama", tmp_path / "base"))) == {"perplexity (32)"}


def test_a_model_that_ends_no_turn(work, capsys, monkeypatch):
    monkeypatch.setattr(chat, "write_conversations", _silent)
    words = ["--data", str(work / "text.txt"), "--window", "32", "--quiet", "--against", str(work / "dense")]
    assert main(["evaluate", str(work / "pruned"), *words]) == 2
    assert "--no-chat" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--against", "dense"], []])
@pytest.mark.parametrize(("data", "window"), [("missing.txt", "32"), ("text.txt", "5000")])
def test_a_wrong_text_or_window_is_told_before_anything_is_written(data, window, more, work, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setattr(chat, "ChatMeasure", lambda *_, **__: pytest.fail("wrote conversations"))
    monkeypatch.setattr(questions, "rightly_answered", lambda *_: pytest.fail("asked questions"))
    assert main(["evaluate", "pruned", *more, "--data", data, "--window", window, "--quiet"]) == 2


@pytest.mark.usefixtures("evaluate")
def test_a_late_failure_loses_no_figure(work, capsys, monkeypatch, tmp_path):
    def fail(*_):
        raise UserError("The text is damaged.")

    copy = shutil.copytree(work / "pruned", tmp_path / "copy")
    monkeypatch.setattr(figures, "text_figures", fail)
    words = ["--data", str(work / "text.txt"), "--window", "32", "--quiet", "--save"]
    assert main(["evaluate", str(copy), *words]) == 2
    out, err = capsys.readouterr()
    assert out.startswith(f"{ANSWERED} 0.5 ")
    assert "The text is damaged." in err
    assert read_record(copy).metrics[ANSWERED].value == 0.5


def _silent(*_, **__):
    from selfpruner_hub.errors import DataError

    raise DataError("The model wrote no user's turn that ends.", "Use other text.")
