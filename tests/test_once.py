"""What is made once a run: by the first who asks, whole, and again where that one fails or is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.once import made_once

ASK = """
import os, pathlib, sys, time
from support.once import made_once
told, seconds = pathlib.Path(sys.argv[2]), float(sys.argv[3])

def fill(directory):
    (directory / "first").write_text(str(os.getpid()))
    with told.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(seconds)
    (directory / "second").write_text(str(os.getpid()))

directory = made_once(pathlib.Path(sys.argv[1]), fill)
print(*{(directory / name).read_text() for name in ("first", "second")})
"""


@pytest.fixture
def asked(tmp_path):
    """A function that starts a process which asks for the directory, and fills it slowly."""

    def ask(seconds):
        words = [sys.executable, "-c", ASK, str(tmp_path / "made"), str(tmp_path / "told"), str(seconds)]
        path = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        return subprocess.Popen(words, env=path, stdout=subprocess.PIPE, text=True)

    return ask


def fillers(tmp_path):
    return (tmp_path / "told").read_text().split() if (tmp_path / "told").exists() else []


def test_of_all_who_ask_at_once_one_fills_it(asked, tmp_path):
    processes = [asked(0.3) for _ in range(3)]
    found = [process.communicate()[0].split() for process in processes]
    assert found == [fillers(tmp_path)] * 3  # one number: both files are of one process
    assert {process.returncode for process in processes} == {0}


def test_one_that_is_killed_leaves_nothing_half_made(asked, tmp_path):
    killed = asked(600)
    while not fillers(tmp_path):
        assert killed.poll() is None
        time.sleep(0.01)
    waiting = asked(0)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    assert waiting.communicate()[0].split() == [str(waiting.pid)]
    assert fillers(tmp_path) == [str(killed.pid), str(waiting.pid)]
    assert not (tmp_path / "made.half").exists()


def test_what_could_not_be_made_is_tried_again(tmp_path):
    with pytest.raises(ZeroDivisionError):
        made_once(tmp_path / "made", lambda directory: (directory / "file").write_text(str(1 / 0)))
    made_once(tmp_path / "made", lambda directory: (directory / "file").write_text("whole"))
    made_once(tmp_path / "made", lambda _: pytest.fail("it is there"))
    assert (tmp_path / "made" / "file").read_text() == "whole"
