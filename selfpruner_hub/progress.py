"""Progress of long work: the interface, and bars on stderr, one per stage with elapsed and remaining time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

Progress = Callable[[str, float, float], None]
"""Callback of long work: it is called with (what, done, total)."""


def silent(what: str, done: float, total: float) -> None:
    """Show nothing."""


class Bars:
    """Progress bars, called with (what, done, total[, note]).

    A new `what` starts a new bar, and so does a `done` that falls: the same work is done once more.

    Args:
        enabled: Whether to show the bars.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._what = ""
        self._bar: tqdm | None = None

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None:
        """Set the bar of `what` to `done` of `total`."""
        if not self._enabled or not total:
            return
        done = round(min(done, total), 2)
        if what != self._what or self._bar is None or done < self._bar.n:
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, leave=True, dynamic_ncols=True, bar_format=_FORMAT)
        self._bar.n, self._bar.total = done, total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.refresh()

    def say(self, line: str) -> None:
        """Write a line to stderr, where progress is shown."""
        if self._enabled:
            self.close()
            tqdm.write(line, file=sys.stderr)

    def close(self) -> None:
        """Close the current bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def noted(progress: Progress, what: str, done: float, total: float, note: str) -> None:
    """Report progress with a note, which bars show; a function of a user is called with (what, done, total).

    Args:
        progress: Function that receives the progress.
        what: Name of the work.
        done: Amount that is done.
        total: Amount in all.
        note: Text to show behind the bar.
    """
    if isinstance(progress, Bars):
        progress(what, done, total, note)
    else:
        progress(what, done, total)


_FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
