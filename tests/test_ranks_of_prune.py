"""Pruning in several processes, as `torchrun` starts them, is that of one process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.mixtures import tiny_mixture
from support.processes import become, launched
from support.tiny import tiny_model, tiny_tokenizer
from support.wrappers import tiny_wrapper

from selfpruner_hub import ranks
from selfpruner_hub.cli import main
from selfpruner_hub.errors import UserError
from selfpruner_hub.search.journal import JOURNAL_FILE
from selfpruner_hub.storage.checkpoints import Checkpoints

TEXT = "The quick brown fox jumps over the lazy dog, and a slow red hen sleeps. " * 700
FAILED = 9
SETTINGS = (
    "window=32", "calibration_tokens=2048", "fisher_tokens=512", "fitness_tokens=512",
    "schedule.population=2", "schedule.crossover=2", "schedule.mutation=2", "schedule.first_share=0.5",
)  # fmt: skip
"""64 windows of calibration text, so eight blocks of which the last one is held out."""


def words_of(folder: Path, name: str, model: str, *more: str) -> list[str]:
    words = ["prune", folder / model, "--beta", 0.3, "--data", f"self+{folder / 'text.txt'}", "--seed", 1]
    words += ["--output", folder / name, "--run-dir", folder / f"{name}-run", "--dtype", "float32", "--device", "cpu"]
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return [str(word) for word in (*words, *settings, *more)]


def run(env: dict[str, str], words: list[str], log: Path, fails_at: str | None) -> None:
    """One process of a launcher; it may end where a checkpoint is loaded or missed."""
    become(env, log.with_suffix(".out"), log.with_suffix(".err"))
    torch.set_num_threads(1)
    if fails_at is not None:
        load = Checkpoints.load

        def ends(self: Checkpoints, name: str, *args: object) -> object:
            if name == fails_at:
                os._exit(FAILED)
            return load(self, name, *args)

        Checkpoints.load = ends
    sys.exit(main(words))


def start(words: list[str], log: Path, count: int, fails_at: str | None = None) -> list[int]:
    """Prune in several processes, of which the last one may fail; returns their exit codes."""
    given = [(words, Path(f"{log}-{rank}"), fails_at if rank == count - 1 else None) for rank in range(count)]
    return launched(run, given, os.environ)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("llama", "phi3", "qwen3", "ministral3"):
        tiny_model(name).save_pretrained(folder / name)
    tiny_wrapper("gemma3").save_pretrained(folder / "gemma3")
    for name in ("llama", "gemma3", "phi3", "qwen3", "ministral3"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text(TEXT)
    return folder


def assert_same(folder: Path, name: str, alone: str) -> None:
    """The same plan, whoever found it, and nearly the same weights."""
    records = [json.loads((folder / each / "selfpruner.json").read_text()) for each in (name, alone)]
    for field in ("widths", "method", "data", "parent"):
        assert records[0][field] == records[1][field]
    mine, theirs = (load_file(folder / each / "model.safetensors") for each in (name, alone))
    for key, value in theirs.items():
        torch.testing.assert_close(mine[key], value, atol=1e-3, rtol=1e-3, msg=key)
    scores = [
        [json.loads(line) for line in (folder / each / JOURNAL_FILE).read_text().splitlines() if '"score"' in line]
        for each in (name, alone)
    ]
    assert [line["widths"] for line in scores[0]] == [line["widths"] for line in scores[1]]
    for one, other in zip(*scores, strict=True):
        assert one["fitness"] == pytest.approx(other["fitness"], rel=1e-4)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("model", "count", "more"),
    [
        ("llama", 2, ("--proposer", "evolution", "--evaluations", "3")),
        ("gemma3", 2, ()),
        ("phi3", 4, ()),
        ("qwen3", 2, ("--offload",)),
        ("ministral3", 4, ("--fitness", "perplexity")),
    ],
)
def test_several_processes_are_one(model, count, more, folder):
    """Gemma 3 normalises outputs, and is in a wrapper; Phi-3 has fused projections; Qwen3 is streamed from files."""
    name = f"{model}-{count}"
    assert main([*words_of(folder, f"{name}-alone", model, *more), "--quiet"]) == 0
    assert start(words_of(folder, name, model, *more), folder / name, count) == [0] * count
    assert_same(folder, name, f"{name}-alone")
    assert f"{folder / name}: " in (folder / f"{name}-0.out").read_text()
    for rank in range(1, count):  # the first one speaks for all
        assert (folder / f"{name}-{rank}.out").read_text() == (folder / f"{name}-{rank}.err").read_text() == ""


@pytest.mark.heavy
@pytest.mark.parametrize("fails_at", ["fisher-0", "layer-1", "layer-3", "repair-0", "repair-2"])
def test_where_one_process_fails_all_end_and_the_same_command_resumes(fails_at, folder):
    name, words = f"failed-{fails_at}", ["--proposer", "evolution", "--evaluations", "3"]
    if not (folder / "undisturbed").exists():
        assert main([*words_of(folder, "undisturbed", "llama", *words), "--quiet"]) == 0
    words = words_of(folder, name, "llama", *words)
    assert start(words, folder / name, 2, fails_at) == [1, FAILED]
    assert "selfpruner: Another process has ended. It says why" in (folder / f"{name}-0.err").read_text()
    assert not (folder / name).exists()
    assert start(words, folder / name, 2) == [0, 0]
    assert_same(folder, name, "undisturbed")


def test_an_error_of_the_first_process_is_that_of_all(folder):
    words = [*words_of(folder, "mistaken", "llama"), "--data", str(folder / "missing.txt")]
    assert start(words, folder / "mistaken", 2) == [2, 2]
    assert "missing.txt" in (folder / "mistaken-0.err").read_text()


@pytest.mark.parametrize(
    ("length", "block", "count", "parts"),
    [(64, 8, 3, [16, 24, 24]), (20, 8, 2, [8, 12]), (5, 1, 2, [2, 3]), (7, 8, 1, [7])],
)
def test_windows_are_divided_in_blocks(length, block, count, parts, monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: count)
    found = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        found.append(ranks.share(length, block))
    assert [part.stop - part.start for part in found] == parts
    assert [part.start for part in found] == [0, *(part.stop for part in found[:-1])]
    assert all(part.start % block == 0 for part in found)


def test_fewer_blocks_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 3)
    with pytest.raises(UserError, match="12 windows of text cannot be divided over 3 processes. Use more text, or 2 "):
        ranks.share(12, 8)


def test_models_on_the_device_of_another_process_are_refused(monkeypatch):
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    ranks.check_device(torch.device("cpu"))
    ranks.check_device(torch.device("cuda", 1))
    with pytest.raises(UserError, match="models on cuda:0, not on the device of its own"):
        ranks.check_device(torch.device("cuda", 0))


@pytest.mark.heavy
def test_a_mixture_is_refused(folder):
    tiny_mixture("qwen3_moe").save_pretrained(folder / "mixture")
    tiny_tokenizer().save_pretrained(folder / "mixture")
    assert start(words_of(folder, "cut-mixture", "mixture"), folder / "cut-mixture", 2) == [2, 2]
    assert "A mixture of experts is not divided" in (folder / "cut-mixture-0.err").read_text()
