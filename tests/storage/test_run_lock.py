"""A run directory is used by one run at a time."""

from __future__ import annotations

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, PrunedModel
from selfpruner_hub.cli import main
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.storage.run_lock import LOCK_FILE, run_lock

DIES_WITH_IT = """
import os, sys
from filelock import FileLock
FileLock(sys.argv[1]).acquire()
os.kill(os.getpid(), 9)
"""


def elsewhere(work):
    """Do work in another thread, which holds none of the locks of this one; return what it returns."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_the_second_run_is_refused(tmp_path):
    run = tmp_path / "run"

    def second():
        with pytest.raises(UserError, match="Another run uses '") as caught:
            AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tiny").prune(0.3, data="self", run_dir=run)
        return caught.value.hint

    with run_lock(run):
        assert elsewhere(second)
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


def test_the_thread_that_has_it_may_take_it_again(tmp_path):
    def other():
        with pytest.raises(UserError, match="Another run uses"), run_lock(tmp_path / "run"):
            pass

    with run_lock(tmp_path / "run"):
        with run_lock(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / LOCK_FILE).exists()
        elsewhere(other)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("there", "run_dirs"), [(False, ()), (False, ("one", "two")), (True, ("one", "two"))], ids=["usual", "own", "there"]
)
def test_two_commands_with_one_output(run_dirs, there, tmp_path, monkeypatch, capsys):
    """The second is refused until the output of the first is saved, whatever their run directories are."""
    save_tiny("llama", tmp_path / "dense", num_hidden_layers=2)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
    if there:
        (tmp_path / "out").mkdir()
    words = ["prune", str(tmp_path / "dense"), "--beta", "0.3", "--output", str(tmp_path / "out"), "--quiet"]
    words += ["--data", str(tmp_path / "text.txt"), "--preset", "draft", "--set", "window=32"]
    words += ["--set", "calibration_tokens=320", "--set", "fitness_tokens=128"]
    first, second = (["--run-dir", str(tmp_path / name)] for name in run_dirs) if run_dirs else ([], [])
    save, statuses = PrunedModel.save_pretrained, []

    def saving(model, *args, **kwargs):
        statuses.append(elsewhere(lambda: main([*words, *second])))
        save(model, *args, **kwargs)

    monkeypatch.setattr(PrunedModel, "save_pretrained", saving)
    assert main([*words, *first]) == 0
    assert statuses == [2]
    assert "selfpruner: Another run uses '" in capsys.readouterr().err
    assert (tmp_path / "out" / "selfpruner.json").exists()
    assert not list(tmp_path.glob("*/.lock"))
    assert not (tmp_path / "out.run").exists()


def test_a_killed_process_locks_nothing(tmp_path):
    command = [sys.executable, "-c", DIES_WITH_IT, str(tmp_path / LOCK_FILE)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / LOCK_FILE).exists()
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="Cannot use '.*' for the run: "), run_lock(tmp_path / "file" / "run"):
        pass
