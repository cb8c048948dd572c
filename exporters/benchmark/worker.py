"""One model in its own process, so that its memory is measured alone and a crash of its runtime stops nothing else.

`started` runs `python -m exporters.benchmark.worker`, or the program of a runtime in its own Python. A `Worker`
exchanges JSON with it, one line for each request and one for each reply.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import IO, Any, cast

import torch
from torch import Tensor

from exporters.format import FORMATS, OtherPython, entry
from exporters.machine import forget_peak, peak_memory
from exporters.runtime import Measured, Runner, Setting
from selfpruner_hub.errors import ModelError, SelfPrunerError, UserError

PAUSE_BEFORE_PASS = 0.01
"""Seconds to wait before a pass: the other model's threads keep spinning for some milliseconds after theirs."""


class Worker:
    """A `Runner` whose model is in another process; `started` makes one.

    Args:
        process: Process that serves the requests.
        errors: File with the stderr of the process.
        name: Name of the model, for error messages.
    """

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], name: str) -> None:
        self._process = process
        self._errors = errors
        self._name = name

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `Runner.measure`."""
        return Measured(**self.ask({"ids": ids.tolist(), "new_tokens": new_tokens}))

    def cross_entropy(self, windows: Tensor) -> float:
        """Measure the loss on text; see `Runner.cross_entropy`."""
        return float(self.ask({"windows": windows.tolist()}))

    def memory(self) -> dict[str, float]:
        """Peak memory since the model was loaded, and while it was loaded, with libraries, in MB; see `Side.memory`."""
        return dict(self.ask({}))

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its result.

        Args:
            request: JSON object that the process understands.

        Returns:
            The result.

        Raises:
            UserError: The process refused the request.
            ModelError: The process has died.
        """
        try:
            cast(IO[str], self._process.stdin).write(json.dumps(request) + "\n")
            cast(IO[str], self._process.stdin).flush()
            reply = json.loads(cast(IO[str], self._process.stdout).readline())
        except (OSError, ValueError) as error:  # broken pipe, or no reply
            status = self._process.wait()
            with contextlib.suppress(OSError):  # what it did not read: Popen would raise that in place of this error
                cast(IO[str], self._process.stdin).close()
            self._errors.seek(0)
            last_line = [f": {line}" for line in self._errors.read().strip().splitlines()][-1:]
            raise ModelError(
                f"The process that ran {self._name!r} ended with status {status}{''.join(last_line)}."[:400],
                "Try fewer tokens or a smaller batch.",
            ) from error
        if "error" in reply:
            raise UserError(reply["error"], reply["hint"])
        return reply["result"]


@contextmanager
def started(runtime: str, name: str, setting: Setting) -> Iterator[Worker]:
    """Start a process and load a model in it; the process ends when the context exits.

    Args:
        runtime: Key of `FORMATS`, a runtime.
        name: Model, or directory of its export, as the runtime loads it.
        setting: Settings for loading it.

    Yields:
        The worker.

    Raises:
        UserError: The model cannot be loaded.
    """
    if (elsewhere := FORMATS[runtime].elsewhere) is not None:
        command, environment = [setting.python, str(elsewhere.program)], OtherPython.environment()
    else:
        command = [sys.executable, "-m", "exporters.benchmark.worker"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # this package, anywhere
    with (
        tempfile.TemporaryFile("w+", errors="replace") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            worker = Worker(process, errors, name)
            worker.ask({"package": FORMATS.package(runtime), "name": name, "setting": asdict(setting)})
            yield worker
        finally:
            process.kill()  # it has nothing to clean up


def main() -> None:
    """Answer requests from stdin until it ends."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # send what libraries print to stderr, so that stdout holds replies only
    serve = _Server()
    for line in sys.stdin:
        try:
            reply: dict[str, Any] = {"result": serve(json.loads(line))}
        except SelfPrunerError as error:
            reply = {"error": error.message, "hint": error.hint}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


class _Server:
    """Answers the requests of a `Worker`: load a model, time passes, measure the loss, report the memory."""

    runner: Runner
    loading: float
    device: str

    def __call__(self, request: dict[str, Any]) -> Any:
        if "name" in request:
            setting = Setting(**request["setting"])
            torch.set_num_threads(setting.threads)
            load = cast(Callable[[str, Setting], Runner], entry(request["package"]).load)
            self.runner = load(request["name"], setting)
            self.device, self.loading = setting.device, peak_memory()
            forget_peak()
            return None
        if "ids" in request:
            ids = torch.tensor(request["ids"])
            time.sleep(PAUSE_BEFORE_PASS)
            return asdict(self.runner.measure(ids, request["new_tokens"]))
        if "windows" in request:
            return self.runner.cross_entropy(torch.tensor(request["windows"]))
        memory = {"peak_mb": peak_memory(), "loading_mb": self.loading}
        if self.device.startswith("cuda") and torch.cuda.is_initialized():
            memory["gpu_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 1e6, 1)
        return memory


if __name__ == "__main__":
    main()
