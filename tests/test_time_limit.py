"""A test that hangs fails, wherever it hangs."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest
from support.time_limit import SECONDS, time_limit


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


def test_what_hangs_outside_python_ends_the_process(request):
    """Later than the limit, which tells more."""
    assert float(request.config.getini("faulthandler_timeout")) > SECONDS
    assert request.config.getini("faulthandler_exit_on_timeout")
