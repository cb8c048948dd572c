"""A process that runs command lines of selfpruner against another Hub than the real one.

The Hub's client reads its endpoint when it is imported, so it needs a process of its own; one serves many tests, since
importing torch takes seconds. Requests and answers are lines of JSON. Waiting between tries is cut short.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path


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
        self._log = (home / "log.txt").open("w")  # of the libraries: which call is tried again
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment(endpoint, home),
        )

    def __call__(self, *words: object, code: str = "", **variables: str) -> Done:
        """Run a command line, after `code`, with some environment variables set."""
        request = {"words": [str(word) for word in words], "code": code, "variables": variables}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)
        self._log.close()


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    sleep, waited = time.sleep, []

    def pause(seconds: float) -> None:
        if seconds >= 0.5:  # between tries; shorter ones are the libraries' own business
            waited.append(seconds)
        sleep(min(seconds, 0.01))

    time.sleep = pause
    from selfpruner_hub.cli import main

    for line in sys.stdin:
        request = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        os.environ.update(request["variables"])
        waited.clear()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                exec(request["code"], {})
                status = main(request["words"]) if request["words"] else 0
            except SystemExit as stop:
                status = stop.code
            except BaseException:
                traceback.print_exc()
                status = -1
        for name in request["variables"]:
            os.environ.pop(name, None)
        answer = {"status": status, "out": out.getvalue(), "err": err.getvalue(), "waited": list(waited)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
