"""A run directory is used by one run at a time."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.storage.run_lock import LOCK_FILE, run_lock

DIES_WITH_IT = """
import os, sys
from filelock import FileLock
FileLock(sys.argv[1]).acquire()
os.kill(os.getpid(), 9)
"""


def test_the_second_run_is_refused(tmp_path):
    run = tmp_path / "run"
    with run_lock(run):
        with pytest.raises(UserError, match="Another run uses the run directory") as caught:
            AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tiny").prune(0.3, data="self", run_dir=run)
        assert caught.value.hint
        (run / "search.jsonl").touch()
    with run_lock(run):  # the second has not taken the lock of the first away
        pass
    assert [path.name for path in run.iterdir()] == ["search.jsonl"]


def test_an_empty_directory_of_its_own_is_deleted(tmp_path):
    with run_lock(tmp_path / "run"), run_lock(None), run_lock(None):
        pass
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_locks_nothing(tmp_path):
    command = [sys.executable, "-c", DIES_WITH_IT, str(tmp_path / LOCK_FILE)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot use the run directory"), run_lock(tmp_path / "file" / "run"):
        pass
