"""A search killed with SIGKILL at ten points and resumed reaches the plan of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from tiny import save_tiny

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # tiny models are many times faster so
SETTINGS = ("window=32", "calibration_tokens=2048", "fitness_tokens=512", "population=3", "crossover=3", "mutation=3")


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_ten_times(tmp_path):
    model = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)

    def command(name: str) -> list[str]:
        words = [sys.executable, "-m", "selfpruner_hub.cli", "prune", str(model), "--beta", "0.3", "--quiet"]
        words += ["--data", str(text), "--evaluations", "25", "--output", str(tmp_path / name)]
        words += ["--run-dir", str(tmp_path / f"{name}-run")]
        return words + [word for setting in SETTINGS for word in ("--set", setting)]

    subprocess.run(command("undisturbed"), check=True, capture_output=True, env=ENV)
    whole = lines(tmp_path / "undisturbed-run" / "search.jsonl")
    journal = tmp_path / "killed-run" / "search.jsonl"
    kills = 0
    for at in sorted(random.Random(0).sample(range(1, whole - 2), 10)):
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENV)
        while process.poll() is None and lines(journal) < at:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (tmp_path / "killed").exists() or process.returncode == 0  # no half-written output
    assert kills >= 8  # a late kill may find the process done
    with journal.open("a") as file:
        file.write('{"kind": "score", "torn')  # and what a crash in the middle of a write leaves
    subprocess.run(command("killed"), check=True, capture_output=True, env=ENV)

    records = [
        [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_text().splitlines()]
        for path in (journal, tmp_path / "undisturbed-run" / "search.jsonl")
    ]
    assert records[0] == records[1]  # no gap, nothing twice, the same in the same order
    names = ("selfpruner.json", "model.safetensors", "config.json")
    assert all((tmp_path / "killed" / n).read_bytes() == (tmp_path / "undisturbed" / n).read_bytes() for n in names)
