"""A test that hangs fails, wherever it hangs; a run that loses a process, or hears nothing, ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.time_limit import SECONDS, SILENCE, time_limit

ROOT = Path(__file__).parents[1]
BESIDE = re.search(r"^BESIDE := (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
"""Options of `make test`."""
LOST = """
import os, signal
def test_before(): pass
def test_lost(): os.kill(os.getpid(), signal.SIGKILL)
def test_after(): pass
"""
SILENT = """
import time
def test_before(): pass
def test_silent(): time.sleep(40)
"""
WATCHED = """
from support.time_limit import SilentRun
def pytest_configure(config):
    if config.getoption("dist", "no") != "no":
        config.pluginmanager.register(SilentRun(config, 8))
"""


@pytest.mark.parametrize(
    "hang", [lambda: time.sleep(60), lambda: subprocess.run(["sleep", "60"], check=False)], ids=["python", "a process"]
)
def test_what_hangs_fails(hang):
    with pytest.raises(pytest.fail.Exception, match="took longer than 0.1 s"), time_limit(0.1):
        hang()


def test_every_test_is_limited():
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= SECONDS


def test_a_limit_inside_another_leaves_that_one():
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(60):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 60
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_limit_that_is_over_before_it_has_begun_leaves_that_one_too(monkeypatch):
    """As on a busy machine, where a tenth of a second may pass between two lines."""
    before, begin = signal.getsignal(signal.SIGALRM), signal.setitimer

    def late(which, seconds):
        begin(which, seconds)
        if seconds == 0.1:
            os.kill(os.getpid(), signal.SIGALRM)

    monkeypatch.setattr(signal, "setitimer", late)
    with pytest.raises(pytest.fail.Exception, match="took longer than 0.1 s"), time_limit(0.1):
        pytest.fail("has begun")
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 60
    assert signal.getsignal(signal.SIGALRM) is before


def test_what_hangs_outside_python_ends_the_process(request):
    """Later than the limit, which tells more."""
    assert float(request.config.getini("faulthandler_timeout")) > SECONDS
    assert request.config.getini("faulthandler_exit_on_timeout")
    assert float(request.config.getini("faulthandler_timeout")) < SILENCE


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("tests", "told"),
    [(LOST, "crashed while running 'test_it.py::test_lost'"), (SILENT, "Timeout (0:00:08)!")],
    ids=["lost", "silent"],
)
def test_a_run_that_loses_a_process_or_hears_nothing_ends_with_an_error(tests, told, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "conftest.py").write_text(WATCHED)
    (tmp_path / "test_it.py").write_text(tests)
    (tmp_path / "test_other.py").write_text("def test_other(): pass\n")
    path = {"PYTHONPATH": str(ROOT / "tests"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "no:cacheprovider", *shlex.split(BESIDE)]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **path}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert told in done.stdout + done.stderr
