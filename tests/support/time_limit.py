"""A time-out for each part of a test: what hangs fails, and the others go on."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

import pytest

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

    handler = signal.signal(signal.SIGALRM, expired)
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left)  # of the limit around this one; 0 where there is none
        signal.signal(signal.SIGALRM, handler)
