"""A run that is killed and resumed reaches the model of an undisturbed one, or says what was changed in between."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from functools import cache
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from support.chat import TEMPLATES, assistant, chat_tokenizer, user
from support.damaged import TIMES
from support.processes import FORKED
from support.tiny import save_tiny, tiny_model

from selfpruner_hub.errors import RunMismatchError
from selfpruner_hub.pruner import AutoPruner

logger = logging.getLogger(__name__)
TEXT = "The quick brown fox jumps over the lazy dog. " * 400
SETTINGS = (
    "window=32", "calibration_tokens=512", "fitness_tokens=512", "schedule.population=3",
    "schedule.crossover=3", "schedule.mutation=3")  # fmt: skip
EVALUATIONS = 13
"""Of two rounds, and one that is cut."""


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def run(folder: Path, name: str) -> None:
    """The command line."""
    from selfpruner_hub.cli import main

    words = ["prune", folder / "dense", "--beta", "0.3", "--quiet", "--data", folder / "text.txt"]
    words += ["--evaluations", EVALUATIONS, "--output", folder / name, "--run-dir", folder / f"{name}-run"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    sys.exit(main([str(word) for word in words]))


def run_and_kill(folder: Path, told: Connection) -> None:
    """Run it undisturbed; then kill it four times, and let it end. Tells the exit code of each, in order.

    The processes are forks of this one: they have the package without an import of their own.
    """
    import selfpruner_hub.cli
    import selfpruner_hub.pruner  # noqa: F401

    torch.set_num_threads(1)  # tiny models are many times faster so

    def started(name: str):
        process = get_context("fork").Process(target=run, args=(folder, name))
        process.start()
        return process

    undisturbed = started("undisturbed")
    undisturbed.join()
    told.send(undisturbed.exitcode)
    whole = lines(folder / "undisturbed-run" / "search.jsonl")
    journal = folder / "killed-run" / "search.jsonl"
    for at in sorted(random.Random(0).sample(range(1, whole - 2), 4)):
        process = started("killed")
        while process.is_alive() and lines(journal) < at:
            time.sleep(0.002)
        process.kill()
        process.join()
        assert not (folder / "killed").exists() or process.exitcode == 0  # no half-written output
        told.send(process.exitcode)
    with journal.open("a") as file:
        file.write('{"kind": "score", "torn')  # and what a crash in the middle of a write leaves
    last = started("killed")
    last.join()
    told.send(last.exitcode)


@pytest.mark.slow
def test_killed_four_times(tmp_path):
    save_tiny("llama", tmp_path / "dense", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text(TEXT)
    heard, told = Pipe(duplex=False)
    process = FORKED.Process(target=run_and_kill, args=(tmp_path, told))
    process.start()
    told.close()
    process.join()
    assert process.exitcode == 0
    undisturbed, *killed, last = (heard.recv() for _ in range(6))
    assert undisturbed == last == 0
    assert killed.count(-signal.SIGKILL) >= 3  # a late kill may find the process done

    journals = [tmp_path / name / "search.jsonl" for name in ("killed-run", "undisturbed-run")]
    records = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in journals
    ]
    assert records[0] == records[1]  # no gap, nothing twice, the same in the same order
    names = ("selfpruner.json", "model.safetensors", "config.json")
    assert all((tmp_path / "killed" / n).read_bytes() == (tmp_path / "undisturbed" / n).read_bytes() for n in names)


MOMENTS = 10 if TIMES == 1 else 50
"""Number of kills: ten of each kind where all is tried (`support.damaged`)."""
CHANGED = {"nothing": "", "configuration": "configuration", "weights": "weights", "template": "data", "text": "data"}
"""What is changed between the kill and the next run, and the setting that a refusal names."""
DATED = TEMPLATES["chatml"].replace("You are tiny.", "It is ' + strftime_now('%d %b %Y') + '.")


def pruned(folder: Path, change: str, **more):
    """Prune a tiny model on conversations of a file and text of its own."""
    first = 100 if change == "text" else 0
    talks = [[user(f"What is {first + i}?"), assistant("A number.")] for i in range(40)]
    (folder / "talks.jsonl").write_text("".join(f"{json.dumps({'messages': talk})}\n" for talk in talks))
    changes = {"rms_norm_eps": 0.3} if change == "configuration" else {}
    model = tiny_model("llama", seed=int(change == "weights"), num_hidden_layers=2, **changes)
    template = DATED.replace("It is ", "This is ") if change == "template" else DATED
    return AutoPruner(model, chat_tokenizer(template=template), "tests/llama").prune(
        0.3, data=f"{folder / 'talks.jsonl'}+self", proposer="evolution", evaluations=0, seeds=("uniform",),
        window=64, calibration_tokens=256, fitness_tokens=64, fisher_tokens=64, **more,
    )  # fmt: skip


def killed(folder: Path, number: int, moment: int) -> None:
    """Begin run `number`, and kill it where it tells of its progress for the `moment`-th time."""
    left = iter(range(moment))

    def kill(*_):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    pruned(folder, "nothing", progress=kill, run_dir=folder / f"run-{number}")


def kill_all(folder: Path, moments: list[int], told: Connection) -> None:
    """Begin and kill a run for each moment, in forks of this process, which has run no backward pass yet."""
    torch.set_num_threads(1)
    for number, moment in enumerate(moments):
        process = get_context("fork").Process(target=killed, args=(folder, number, moment))
        process.start()
        process.join()
        told.send(process.exitcode)


def test_what_is_changed_in_between_is_noticed(tmp_path):
    """Killed at any moment, a run of a changed model or text is refused by name, or is that of a fresh run."""
    events: list[str] = []
    whole = pruned(tmp_path, "nothing", progress=lambda what, *_: events.append(what))
    assert whole.report.data["chat_template"] == {"date": "2026-01-01"}
    fresh = cache(lambda change: pruned(tmp_path, change, progress=False))
    moments = sorted(random.Random(0).choices(range(1, len(events)), k=MOMENTS))
    heard, told = Pipe(duplex=False)
    process = FORKED.Process(target=kill_all, args=(tmp_path, moments, told))
    process.start()
    told.close()
    assert [heard.recv() for _ in moments] == [-signal.SIGKILL] * MOMENTS
    process.join()
    refused = 0
    for number in range(MOMENTS):
        change = list(CHANGED)[number % len(CHANGED)]
        said = found = None
        try:
            found = pruned(tmp_path, change, progress=False, run_dir=tmp_path / f"run-{number}")
        except RunMismatchError as error:
            said = str(error)
        if said is not None:
            assert CHANGED[change], said
            assert f"{CHANGED[change]}: " in said
            refused += 1
            continue
        assert found.report == fresh(change).report
        assert (found.report == whole.report) == (change == "nothing")
        for a, b in zip(found.model.parameters(), fresh(change).model.parameters(), strict=True):
            assert torch.equal(a, b)
    logger.info("%d of %d resumed runs were refused, the others are right", refused, MOMENTS)
    assert 0 < refused < MOMENTS
