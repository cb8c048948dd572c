"""Python code in a process of its own, forked from one that has torch: its import is most of what a start takes."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

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


def become(env: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Give this process an environment, and files to write to."""
    for number, file in enumerate((stdout, stderr), 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)


def _run(command: list[str], env: dict[str, str], cwd: Path | None, files: Sequence[Path]) -> None:
    become(env, *files)
    if cwd is not None:
        os.chdir(cwd)
    first, *words = command
    sys.path.insert(0, "")
    if first == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *words]
        exec(first, {"__name__": "__main__"})
