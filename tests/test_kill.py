"""A search killed with SIGKILL at four points and resumed reaches the plan of an undisturbed one."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import sys
import time

import pytest
from support.tiny import save_tiny

SETTINGS = ("window=32", "calibration_tokens=512", "fitness_tokens=512", "population=3", "crossover=3", "mutation=3")


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(words: list[str]) -> None:
    """The command line, in a process of its own."""
    from selfpruner_hub.cli import main

    sys.exit(main(words))


@pytest.mark.slow
def test_killed_four_times(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # tiny models are many times faster so
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["selfpruner_hub.cli", "selfpruner_hub.pruner"])  # imported once
    model = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)

    def started(name: str) -> multiprocessing.Process:
        words = ["prune", str(model), "--beta", "0.3", "--quiet"]
        words += ["--data", str(text), "--evaluations", "25", "--output", str(tmp_path / name)]
        words += ["--run-dir", str(tmp_path / f"{name}-run")]
        words += [word for setting in SETTINGS for word in ("--set", setting)]
        process = processes.Process(target=run, args=(words,))
        process.start()
        return process

    def finished(name: str) -> None:
        process = started(name)
        process.join()
        assert process.exitcode == 0

    finished("undisturbed")
    whole = lines(tmp_path / "undisturbed-run" / "search.jsonl")
    journal = tmp_path / "killed-run" / "search.jsonl"
    kills = 0
    for at in sorted(random.Random(0).sample(range(1, whole - 2), 4)):
        process = started("killed")
        while process.is_alive() and lines(journal) < at:
            time.sleep(0.002)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "killed").exists() or process.exitcode == 0  # no half-written output
    assert kills >= 3  # a late kill may find the process done
    with journal.open("a") as file:
        file.write('{"kind": "score", "torn')  # and what a crash in the middle of a write leaves
    finished("killed")

    records = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (journal, tmp_path / "undisturbed-run" / "search.jsonl")
    ]
    assert records[0] == records[1]  # no gap, nothing twice, the same in the same order
    names = ("selfpruner.json", "model.safetensors", "config.json")
    assert all((tmp_path / "killed" / n).read_bytes() == (tmp_path / "undisturbed" / n).read_bytes() for n in names)
