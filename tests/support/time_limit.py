"""A time-out for each part of a test: what hangs fails, and the others go on. A run that hangs as a whole ends."""

from __future__ import annotations

import contextlib
import faulthandler
import signal
import threading
from collections.abc import Iterator

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

SECONDS = 900
"""Longest that setting up, running or tearing down a test may take, even on a busy machine. Where it hangs outside
Python, pytest's `faulthandler_timeout` ends the process, a little later."""


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Fail where what is inside takes longer; nothing on systems without SIGALRM, or outside the main thread."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def expired(_number: object, _frame: object) -> None:
        pytest.fail(f"took longer than {seconds:g} s")

    handler, (left, _) = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    try:
        signal.signal(signal.SIGALRM, expired)
        signal.setitimer(signal.ITIMER_REAL, seconds)  # on a busy machine it may end before the next line
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of the limit around this one; 0 where there is none
        signal.signal(signal.SIGALRM, handler)


SILENCE = 1500
"""Longest time without a report from any of the processes that run tests side by side: longer than any part of a test
may take."""


class SilentRun:
    """A plugin of the process that hands out tests: it ends a run from which nothing is heard any more.

    pytest-xdist waits for ever where the process of a test is gone and a pipe to it is still open, because a process
    that was forked from it lives.
    """

    def __init__(self, config: pytest.Config, seconds: float = SILENCE) -> None:
        self._config, self._seconds = config, seconds

    def _heard(self) -> None:
        stderr = self._config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=stderr)

    def pytest_testnodeready(self) -> None:
        """A process is ready."""
        self._heard()

    def pytest_runtest_logreport(self) -> None:
        """A part of a test is over."""
        self._heard()

    def pytest_sessionfinish(self) -> None:
        """All is over."""
        faulthandler.cancel_dump_traceback_later()
