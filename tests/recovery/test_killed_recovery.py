"""A recovery that is killed at five random moments and resumed each time makes the model of an undisturbed one."""

from __future__ import annotations

import json
import random
import signal
import sys
import time
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from support.processes import FORKED
from support.tiny import tiny_model, tiny_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 300
STEPS = 30
SETTINGS = ("window=32", "batch_tokens=128", "learning_rate=2e-3", "checks=10")


def run(folder: Path, name: str) -> None:
    """The command line."""
    from selfpruner_hub.cli import main

    words = ["recover", folder / "pruned", "--against", folder / "dense", "--data", f"self+{folder / 'text.txt'}"]
    words += ["--tokens", 128 * STEPS, "--output", folder / name, "--run-dir", folder / f"{name}-run", "--quiet"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    sys.exit(main([str(word) for word in words]))


def run_and_kill(folder: Path, told: Connection) -> None:
    """Run it undisturbed; then kill it five times, and let it end. Tells the exit code of each, in order."""
    import torch

    import selfpruner_hub.cli
    import selfpruner_hub.recovery.recover  # noqa: F401

    torch.set_num_threads(1)

    def started(name: str):
        process = get_context("fork").Process(target=run, args=(folder, name))
        process.start()
        return process

    undisturbed, begun = started("undisturbed"), time.monotonic()
    undisturbed.join()
    told.send(undisturbed.exitcode)
    took = time.monotonic() - begun
    for share in sorted(random.Random(1).uniform(0.15, 0.8) for _ in range(5)):
        process = started("killed")
        process.join(took * share)
        process.kill()
        process.join()
        assert not (folder / "killed").exists() or process.exitcode == 0  # no half-written output
        told.send(process.exitcode)
    last = started("killed")
    last.join()
    told.send(last.exitcode)


@pytest.mark.slow
def test_killed_five_times(tmp_path, saved_model):
    from selfpruner_hub.pruned_model import PrunedModel

    dense = tiny_model("llama", num_hidden_layers=2)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    PrunedModel.from_pretrained(saved_model).save_pretrained(tmp_path / "pruned")
    (tmp_path / "text.txt").write_text(TEXT)
    heard, told = Pipe(duplex=False)
    process = FORKED.Process(target=run_and_kill, args=(tmp_path, told))
    process.start()
    told.close()
    process.join()
    assert process.exitcode == 0
    undisturbed, *killed, last = (heard.recv() for _ in range(7))
    assert undisturbed == last == 0
    assert killed.count(-signal.SIGKILL) >= 3  # a late kill may find the process done

    records = [json.loads((tmp_path / name / "selfpruner.json").read_text()) for name in ("killed", "undisturbed")]
    minutes = [record["recovery"].pop("minutes") for record in records]
    assert all(minute >= 0 for minute in minutes)
    for record in records:
        record["method"].pop("training")
    assert records[0] == records[1]
    assert records[0]["recovery"]["steps"] == STEPS
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()
