"""Recovery as users call it: of a saved pruned model, in Python and on the command line."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.cli import main
from selfpruner_hub.cli.recover import recovery_lines
from selfpruner_hub.errors import UserError
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.recovery.schedule import Schedule
from selfpruner_hub.storage.model_record import Metric, read_record

TEXT = "The quick brown fox jumps over the lazy dog. " * 200
SETTINGS = {"window": 32, "batch_tokens": 128, "learning_rate": 2e-3, "warmup": 2, "checks": 2}
WORDS = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
PARENT = {"num_hidden_layers": 2}
IDS = torch.randint(3, 128, (2, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@pytest.fixture
def parent(tmp_path):
    tiny_model("llama", **PARENT).save_pretrained(tmp_path / "parent")
    return str(tmp_path / "parent")


def test_a_recovered_model_is_saved_with_what_was_done(saved_model, text, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    pruned.report = replace(pruned.report, metrics={"perplexity": Metric(3.0, None, "once")})
    before = copy.deepcopy(pruned.model.state_dict())
    better = pruned.recover(
        tiny_model("llama", **PARENT), tokens=16 * 128, data=f"self+{text}", progress=False, seed=4, **SETTINGS
    )
    assert better is not pruned
    assert pruned.report.recovery is None
    assert all(torch.equal(value, before[name]) for name, value in pruned.model.state_dict().items())
    better.save_pretrained(tmp_path / "better")
    again = PrunedModel.from_pretrained(tmp_path / "better")
    assert torch.equal(again(IDS).logits, better(IDS).logits)
    found = again.report.recovery
    assert (found["tokens"], found["seed"], found["settings"]["window"]) == (2048, 4, 32)
    assert [one["name"] for one in found["texts"]] == ["self", "text.txt"]
    assert again.report.metrics == {}
    assert "distilled from its parent on 2,048 tokens" in again.report.treatment
    card = (tmp_path / "better" / "README.md").read_text()
    assert "not retrained" not in card
    after = next(one for one in found["deciding"] if one["name"] == "text.txt")
    assert f"| text.txt | {after['tokens']:,} | {after['before']:.3f} | {after['after']:.3f} |" in card
    assert tmp_path / "better" / "plots" / "recovery.png" in plot_search(
        tmp_path / "better", tmp_path / "better" / "plots", ("png",)
    )


def test_card_and_command_line_tell_the_answers(saved_model, text, tmp_path):
    pruned = PrunedModel.from_pretrained(saved_model)
    better = pruned.recover(tiny_model("llama", **PARENT), tokens=2048, data=f"self+{text}", progress=False, **SETTINGS)
    assert better.report.recovery["answers"] is None  # a base model is asked nothing
    better.save_pretrained(tmp_path / "base")
    assert "plain questions that the parent answers" not in (tmp_path / "base" / "README.md").read_text()
    recovery = {**better.report.recovery, "answers": {"asked": 106, "before": 38, "after": 41}}
    better.report = replace(better.report, recovery=recovery)
    better.save_pretrained(tmp_path / "chat")
    card = (tmp_path / "chat" / "README.md").read_text()
    assert (
        "\nOf 106 plain questions that the parent answers, the model answered 38 before and 41 after.\n\nThese" in card
    )
    lines = recovery_lines("chat", read_record(tmp_path / "chat"))
    assert lines[-1] == "plain questions of 106 that the parent answers: 38 -> 41"


def test_a_model_that_is_not_its_parent_is_refused(saved_model, text):
    pruned = PrunedModel.from_pretrained(saved_model)
    with pytest.raises(UserError, match="is not 'tests/llama', the parent of this model"):
        pruned.recover(tiny_model("llama", num_hidden_layers=5), tokens=1024, data=text, **SETTINGS)


def test_what_does_not_help_leaves_the_model(saved_model, text, caplog):
    pruned = PrunedModel.from_pretrained(saved_model)
    worse = {**SETTINGS, "learning_rate": 1.0}
    assert pruned.recover(tiny_model("llama", **PARENT), tokens=1024, data=text, progress=False, **worse) is pruned
    assert "did not improve the model" in caplog.text
    assert "The model is left as it was." in caplog.text


def test_on_the_command_line(saved_model, text, parent, tmp_path, capsys):
    data = f"self+{text}"
    words = ["recover", str(saved_model), "--against", parent, "--tokens", "2048", "--data", data, "--quiet", *WORDS]
    assert main([*words, "--output", str(tmp_path / "better"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["improved"]
    assert read_record(tmp_path / "better").recovery["tokens"] == 2048
    assert read_record(saved_model).recovery is None
    assert not (tmp_path / "better.run").exists()
    assert main(words) == 0  # in place
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{saved_model}: trained on 2,048 tokens in ")
    assert read_record(saved_model).recovery["tokens"] == 2048
    assert main([*words[:-10], "--set", "learning_rate=1.0", *WORDS[:4]]) == 0
    assert capsys.readouterr().out == f"{saved_model}: not improved, and left as it was.\n"


def test_cut_and_recovery_in_one_command(parent, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("selfpruner_hub.recovery.task.planned", lambda *_: Schedule(12, [12 * 16], None))
    monkeypatch.setattr("selfpruner_hub.recovery.settings.REFERENCE_RATE", 2e-3)
    tiny_tokenizer().save_pretrained(parent)
    words = ["prune", parent, "--beta", "0.3", "--output", str(tmp_path / "made"), "--data", "self", "--quiet"]
    small = ("window=32", "calibration_tokens=512", "fitness_tokens=128", "fisher_tokens=128")
    assert main([*words, *(word for one in small for word in ("--set", one)), "--recover", "5"]) == 0
    record, said = read_record(tmp_path / "made"), capsys.readouterr().out
    assert record.recovery["tokens"] == 12 * 16 * 128
    assert f"{tmp_path / 'made'}: trained on {record.recovery['tokens']:,} tokens in" in said
    assert "KL from the parent on self: " in said
    assert not (tmp_path / "made.run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--minutes", "soon"], "minutes of recovery must be a number above 0; got 'soon'"),
        (["--tokens", "1.5"], "tokens of recovery must be a number above 0; got 1.5"),
        (["--tokens", "1024", "--set", "speed=1"], "Unknown recovery setting speed"),
        (["--tokens", "1024", "--seed", "-1"], "seed must be a whole number"),
        (["--tokens", "10"], "That is too little for a recovery. Give it at least tokens=512"),
    ],
)
def test_mistakes_are_one_line(words, told, saved_model, text, parent, capsys):
    more = ["--against", parent, "--data", text, "--quiet", "--set", "window=32", "--set", "batch_tokens=128"]
    assert main(["recover", str(saved_model), *more, *words]) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
