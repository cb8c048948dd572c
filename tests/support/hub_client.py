"""A process that runs command lines of selfpruner against another Hub than the real one.

The Hub's client reads its endpoint when it is imported, so it needs a process of its own; one serves many tests, since
importing transformers takes seconds. Waiting between tries is cut short.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from support.processes import FORKED, become


def environment(endpoint: str, home: Path, **more: str) -> dict[str, str]:
    """Of a process that takes `endpoint` for the Hub and writes below `home` only."""
    inherited = {
        key: os.environ[key]
        for key in ("PATH", "PYTHONPATH", "LANG", "LD_LIBRARY_PATH", "COVERAGE_RCFILE")
        if key in os.environ
    }
    return {
        **inherited,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


@dataclass
class Done:
    status: int
    out: str
    err: str
    waited: list[float]
    """Seconds of each pause that was asked for."""


class Client:
    """Runs `selfpruner` command lines in one process."""

    def __init__(self, endpoint: str, home: Path) -> None:
        self._requests, theirs = FORKED.Pipe()
        log = home / "log.txt"  # of the libraries: which call is tried again
        self._process = FORKED.Process(target=_serve, args=(theirs, environment(endpoint, home), log), daemon=True)
        self._process.start()
        theirs.close()

    def __call__(self, *words: object, code: str = "", **variables: str) -> Done:
        """Run a command line, after `code`, with some environment variables set."""
        self._requests.send(([str(word) for word in words], code, variables))
        return self._requests.recv()

    def close(self) -> None:
        self._requests.close()
        self._process.join(30)


def _drawn_once(draw: Callable[[Path], dict[str, bytes]], name: str) -> Callable[[Path], dict[str, bytes]]:
    """Draw the pictures of a journal, a file of that name, once for all its copies: they take most of a push."""
    known: dict[bytes, dict[str, bytes]] = {}

    def pictures(directory: Path) -> dict[str, bytes]:
        journal = (directory / name).read_bytes() if (directory / name).is_file() else b""
        if journal not in known:
            known[journal] = draw(directory)
        return known[journal]

    return pictures


def _serve(requests: Connection, env: dict[str, str], log: Path) -> None:
    """Answer requests until there are none."""
    become(env, log, log)
    sleep, waited = time.sleep, []

    def pause(seconds: float) -> None:
        if seconds >= 0.5:  # between tries; shorter ones are the libraries' own business
            waited.append(seconds)
        sleep(min(seconds, 0.01))

    time.sleep = pause
    from selfpruner_hub.cli import main
    from selfpruner_hub.hub import bundle

    bundle._pictures = _drawn_once(bundle._pictures, bundle.JOURNAL_FILE)
    while True:
        try:
            words, code, variables = requests.recv()
        except EOFError:
            return
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(variables)
        waited.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(code, {})
                status = main(words) if words else 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = -1
        for name in variables:
            os.environ.pop(name, None)
        requests.send(Done(status, out.getvalue(), err.getvalue(), list(waited)))
