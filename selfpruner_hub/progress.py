"""How long work tells how far it is; bars on stderr: one per stage, with rate and time left."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) while long work goes on."""


def silent(what: str, done: float, total: float) -> None:
    """Tell nobody."""


class Bars:
    """Called with (what, done, total[, note]); a new `what` starts a new bar.

    Args:
        enabled: Show nothing when False.
    """

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._what = ""
        self._bar: tqdm | None = None

    def __call__(self, what: str, done: float, total: float, note: str = "") -> None:
        """Move the bar of `what` to `done` of `total`."""
        if not self._enabled or not total:
            return
        if what != self._what or self._bar is None:
            self.close()
            self._what = what
            self._bar = tqdm(total=total, desc=what, leave=True, dynamic_ncols=True, bar_format=_FORMAT)
        self._bar.n = round(min(done, total), 2)
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """End the bar that is shown."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_FORMAT = "{desc}: {percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
