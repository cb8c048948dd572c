"""Python code in a process of its own, forked from one that has torch: its import is most of what a start takes."""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Self

FORKED = get_context("forkserver")
# What transformers takes from torch. Nothing of Hugging Face: it reads the environment once, when it is imported.
FORKED.set_forkserver_preload(
    ["torch._dynamo", "torch.distributed.tensor", "torch.distributed.checkpoint", "scipy.optimize"]
)


def run_python(
    code: str, *words: object, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run code, or `-m MODULE`, as `python -c` does; nothing is on standard input.

    It is for what a fresh process imports, reads and prints. It finds what the tests find, and calls no `atexit`
    functions.
    """
    command = [code, *map(str, words)]
    with TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        variables = dict(os.environ if env is None else env)
        process = FORKED.Process(target=_run, args=(command, variables, cwd, files), daemon=True)
        process.start()
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode or 0, *(file.read_text() for file in files))


def launched(run: Callable[..., None], given: Sequence[tuple[object, ...]], env: Mapping[str, str]) -> list[int]:
    """Run a function in one process for each tuple of arguments, after the environment of a launcher's process.

    Returns:
        The exit codes of the processes.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(len(given))
    env = {**env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    processes = []
    for rank, arguments in enumerate(given):
        own = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(FORKED.Process(target=run, args=(own, *arguments)))
        processes[-1].start()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def become(env: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Give this process an environment, and files to write to."""
    for number, file in enumerate((stdout, stderr), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    _adopt(env)


def _adopt(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)


def _run(command: list[str], env: dict[str, str], cwd: Path | None, files: Sequence[Path]) -> None:
    become(env, *files)
    if cwd is not None:
        os.chdir(cwd)
    _execute(command)


def _execute(command: Sequence[str]) -> None:
    first, *words = command
    sys.path.insert(0, "")
    if first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words]
        exec(first, {"__name__": "__main__"})


class ForkedPopen:
    """What `subprocess.Popen` is for a worker of the benchmarks, whose command is `python -m MODULE`.

    Args:
        command: Words of the command.
        env: The environment.
        stderr: File that takes its standard error; the other two are pipes.
        **_: Ignored: `stdin`, `stdout` and `text` of `Popen`.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], stderr: IO[str], **_: object) -> None:
        (asked, requests), (replies, told) = os.pipe(), os.pipe()
        theirs = [Connection(asked), Connection(told), Connection(os.dup(stderr.fileno()))]
        self._process = FORKED.Process(target=_serve, args=(command[1:], dict(env), theirs), daemon=True)
        self._process.start()
        for end in theirs:
            end.close()
        self.stdin, self.stdout, self.pid = os.fdopen(requests, "w"), os.fdopen(replies), self._process.pid
        self.kill = self._process.kill

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdin.close()
        self.stdout.close()
        self.wait()

    def wait(self) -> int:
        """Wait for its end, and return its status."""
        self._process.join()
        return self._process.exitcode or 0


def _serve(command: list[str], env: dict[str, str], files: Sequence[Connection]) -> None:
    for number, file in enumerate(files):
        os.dup2(file.fileno(), number)
    _adopt(env)
    sys.stdin = os.fdopen(0)  # multiprocessing has given this process an empty one
    _execute(command)
