"""A run that ends anywhere goes on from there, to the same model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import pruned_model
from selfpruner_hub.errors import HubError, OutputError
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.pruning import importance
from selfpruner_hub.search import find_plan
from selfpruner_hub.storage.checkpoints import Checkpoints

SETTINGS = {
    "data": "self", "proposer": "evolution", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 128,
    "evaluations": 6,
}  # fmt: skip


class Ended(BaseException):
    """The process ends here."""


def test_what_is_not_there_or_damaged_is_none(tmp_path):
    kept = Checkpoints(tmp_path / "new")
    assert kept.load("a") is None
    kept.save("a", {"x": torch.arange(6).view(2, 3).t()})
    assert torch.equal(kept.load("a")["x"], torch.arange(6).view(2, 3).t())
    file = tmp_path / "new" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert kept.load("a") is None
    kept.clear()
    assert not (tmp_path / "new").exists()


def test_what_another_run_saved_is_not_loaded(tmp_path):
    one, other = (Checkpoints(tmp_path).of(run) for run in ("one", "other"))
    one.save("a", {"x": torch.zeros(2)})
    assert one.load("a") is not None
    assert Checkpoints(tmp_path).of("one").load("a") is not None
    assert other.load("a") is None
    assert Checkpoints(tmp_path).load("a") is None


@pytest.mark.parametrize("change", ["model", "text"])
def test_stages_of_another_run_are_done_again_without_a_journal(change, tmp_path):
    """The journal is what refuses another run; without it, its stages are not taken for this run's."""
    text = ["The quick brown fox jumps over the lazy dog. " * 40]
    settings = {**SETTINGS, "data": text, "evaluations": 0, "progress": False}
    AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tiny").prune(0.3, run_dir=tmp_path, **settings)
    (tmp_path / "search.jsonl").unlink()
    model = tiny_model("llama", seed=int(change == "model"))
    if change == "text":
        settings["data"] = [text[0].upper()]
    found, expected = (
        AutoPruner(model, tiny_tokenizer(), "tiny").prune(0.3, run_dir=folder, **settings)
        for folder in (tmp_path, None)
    )  # fmt: skip
    assert found.plan == expected.plan
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_kept_without_a_directory():
    kept = Checkpoints()
    kept.save("a", {"x": torch.zeros(1)})
    assert kept.load("a") is None
    kept.clear()


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        Checkpoints(tmp_path / "file").save("a", {"x": torch.zeros(1)})


@pytest.mark.parametrize("stage", ["sensitivities", "calibrating", "searching", "repairing"])
def test_a_run_goes_on_where_it_ended(stage, tmp_path, monkeypatch):
    pruner = AutoPruner(tiny_model("llama"), None, "tiny")
    model_layers = pruner.shape.num_layers
    undisturbed = pruner.prune(0.3, progress=False, **SETTINGS)
    told, sought = [], []
    obs = importance.ORDERS["obs"]
    monkeypatch.setitem(importance.ORDERS, "obs", lambda *args: sought.append(len(args[0])) or obs(*args))

    def end(what, done, total, *_):
        told.append((what, done))
        if what == stage and done >= min(2, total):
            raise Ended

    with pytest.raises(Ended):
        pruner.prune(0.3, run_dir=tmp_path, progress=end, **SETTINGS)
    assert all(
        torch.equal(a, b) for a, b in zip(pruner.model.parameters(), tiny_model("llama").parameters(), strict=True)
    )
    first, told = told, []

    def tell(what, done, _total, *_):
        told.append((what, done))

    again = AutoPruner(tiny_model("llama"), None, "tiny").prune(0.3, run_dir=tmp_path, progress=tell, **SETTINGS)
    assert not {event for event in first if event[0] == "repairing"} & set(told)  # no layer is done twice
    assert len(sought) == 2 * model_layers  # nor is its order sought twice: that of attention and FFN
    assert again.plan == undisturbed.plan
    for a, b in zip(again.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["search.jsonl"]


def test_the_search_of_another_device_is_replayed(tmp_path, monkeypatch):
    """Another device measures other seed plans by a few bits: those of the journal count, and no score is repeated."""
    pruner = AutoPruner(tiny_model("llama"), None, "tiny")
    first = pruner.prune(0.3, run_dir=tmp_path, progress=False, **SETTINGS)
    journal = (tmp_path / "search.jsonl").read_text()
    compute = find_plan.seeds

    def otherwise(budget, *_):
        return compute(replace(budget, share=budget.share - 0.1))

    monkeypatch.setattr(find_plan, "seeds", otherwise)
    again = pruner.prune(0.3, run_dir=tmp_path, progress=False, **SETTINGS)
    assert again.plan == first.plan
    assert (tmp_path / "search.jsonl").read_text() == journal


def test_what_a_run_finished_is_kept_until_its_model_is_saved(tmp_path):
    pruned = AutoPruner(tiny_model("llama"), None, "tiny").prune(0.3, run_dir=tmp_path, progress=False, **SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        pruned.save_pretrained(tmp_path / "file" / "model")
    layers = {f"repair-{index}.safetensors" for index in range(pruned.model.config.num_hidden_layers)}
    assert layers <= {path.name for path in (tmp_path / "stages").iterdir()}
    pruned.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "stages").exists()


def test_all_checkpoints_of_a_run_take_less_than_twice_the_model(tmp_path):
    """They hold the Fisher information, orders, ridges and repaired layers: no second moments."""
    pruner = AutoPruner(tiny_model("llama"), None, "tiny")
    pruner.prune(0.3, run_dir=tmp_path, progress=False, **SETTINGS)
    names = {path.stem.partition("-")[0] for path in (tmp_path / "stages").iterdir()}
    assert names == {"elapsed", "text", "fisher", "layer", "repair"}
    model = sum(parameter.nbytes for parameter in pruner.model.parameters())
    assert sum(path.stat().st_size for path in (tmp_path / "stages").iterdir()) < 2 * model


def test_and_until_it_is_published(tmp_path, monkeypatch):
    pruned = AutoPruner(tiny_model("llama"), None, "tiny").prune(0.3, run_dir=tmp_path, progress=False, **SETTINGS)

    def refuse(*_args, **_more):
        raise HubError("The Hub is out of reach.")

    monkeypatch.setattr(pruned_model, "publish", refuse)
    with pytest.raises(HubError):
        pruned.push_to_hub("me/model")
    assert (tmp_path / "stages").is_dir()
    monkeypatch.setattr(pruned_model, "publish", lambda *_args, **_more: "published")
    assert pruned.push_to_hub("me/model") == "published"
    assert not (tmp_path / "stages").exists()
