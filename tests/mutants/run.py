"""Put the faults of faults.toml into a scratch copy of the repository, one at a time, and see which test notices.

Run: make mutants, or python tests/mutants/run.py [--untried] [WORD …]; with words, only faults of files whose path has
one of them.
It prints the test that noticed each fault, and keeps that in results.json, which git ignores: the next run tries that
test first, and `--untried` only what has not been tried here.

Each run is a fork of this process, which has the libraries imported already but not the package: importing them takes
ten seconds, and the tests that are run one or two. Of each file, the tests run until one fails, and that one must pass
without the fault.
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FAULTS = Path(__file__).with_name("faults.toml")
RESULTS = Path(__file__).with_name("results.json")
LIBRARIES = (
    *("pytest", "hypothesis", "torch", "torch.utils.data", "transformers", "transformers.generation"),
    *("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "datasets", "accelerate", "gguf"),
    *("huggingface_hub.inference._client", "matplotlib.pyplot", "safetensors.torch", "llguidance"),
)
WITHOUT = ("cacheprovider", "xdist", "anyio", "faulthandler")
"""Plugins of pytest that are not needed; a fork would wait for ever for the thread that watches its parent."""
OPTIONS = (
    *("-q", "-x", "-m", "not slow and not gpu", "--hypothesis-seed=0"),
    *(word for name in WITHOUT for word in ("-p", f"no:{name}")),
)
UNTRIED = "--untried"
OUT_OF_TIME = "time-out"
NOTHING_FAILED = (0, 4, 5)
"""What pytest ends with where all tests passed, or there is no such test."""
BUSIEST = 120
"""Most processor time of one run, in seconds."""
LONGEST = 600
"""Longest time of one run, in seconds of the clock: what waits for ever uses no processor."""


@dataclass(frozen=True)
class Fault:
    """A replacement in one file that makes the code wrong, and the tests that should notice."""

    file: str
    what: str
    old: str
    """Text that is replaced; the file has it once."""
    new: str
    tests: tuple[str, ...]
    lives: str
    """Reason why no test needs to notice; empty where one must."""

    def put_in(self, text: str) -> str:
        """Return the text of the file with the fault."""
        if text.count(self.old) != 1:
            raise SystemExit(
                f"{self.file} has the text of the fault {self.what!r} {text.count(self.old)} times, not once."
            )
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What the tests said."""

    failed: str
    """First test that failed, or `OUT_OF_TIME`; empty where all passed."""
    seconds: float
    """Processor time, which other programs do not change."""


def faults() -> list[Fault]:
    """Read all faults, file by file."""
    modules = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["module"]
    return [
        Fault(m["file"], f["what"], f["old"], f["new"], tuple(f.get("tests", m["tests"])), f.get("lives", ""))
        for m in modules
        for f in m["fault"]
    ]


class FirstFailure:
    """A pytest plugin that writes the name of the first test that failed into a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed and not self._file.exists():
            self._file.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run(tests: Sequence[str], scratch: Path, log: Path, *, compiles: bool = True) -> Outcome:
    """Run tests in a fork of this process, with a limit on its processor time; end all that it started and left."""
    found = log.with_suffix(".failed")
    found.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setsid()
        sys.dont_write_bytecode = not compiles
        resource.setrlimit(resource.RLIMIT_CPU, (BUSIEST, BUSIEST))
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(scratch)
        os.environ["PYTHONPATH"] = str(scratch)
        os.environ.update({} if compiles else {"PYTHONDONTWRITEBYTECODE": "1"})
        sys.path.insert(0, str(scratch))
        status = importlib.import_module("pytest").main([*OPTIONS, *tests], plugins=[FirstFailure(found)])
        sys.stdout.flush()
        os._exit(status)
    started, ended = time.monotonic(), 0
    while not ended and time.monotonic() - started < LONGEST:
        time.sleep(0.05)
        ended, status, used = os.wait4(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        _, status, used = os.wait4(child, 0)
    seconds, code = used.ru_utime + used.ru_stime, os.waitstatus_to_exitcode(status)
    failed = found.read_text() if found.exists() else ""
    return Outcome(failed or (OUT_OF_TIME if code < 0 else "" if code in NOTHING_FAILED else f"exit {code}"), seconds)


def copied(scratch: Path) -> None:
    """Copy what git tracks, or would, and compile the packages once."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")[:-1]
    for name in names:
        if (ROOT / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, scratch / name)
    for package in ("selfpruner_hub", "exporters"):
        compileall.compile_dir(scratch / package, quiet=2)


class Trial:
    """Runs tests on a copy of the repository, with one fault or with none.

    Args:
        scratch: Copy of the repository.
        log: File of pytest's output.
    """

    def __init__(self, scratch: Path, log: Path) -> None:
        self._scratch, self._log = scratch, log

    def check_sound(self, tests: Iterable[str]) -> None:
        """End the run where one of these tests fails without a fault."""
        found = run(sorted(tests), self._scratch, self._log)
        if found.failed:
            raise SystemExit(f"{self._log.read_text()}\n{found.failed} fails without any fault.")

    def failed(self, fault: Fault, tests: Sequence[str]) -> str:
        """Return the first of these tests that fails with a fault, if any."""
        path = self._scratch / fault.file
        sound, times = path.read_text(encoding="utf-8"), path.stat()
        path.write_text(fault.put_in(sound), encoding="utf-8")
        found = run(tests, self._scratch, self._log, compiles=False)
        path.write_text(sound, encoding="utf-8")
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        print(f"{found.seconds:6.1f} s {fault.file}: {fault.what}: {found.failed or 'not noticed'}", flush=True)
        return found.failed


def tried(chosen: Sequence[Fault], trial: Trial, before: Mapping[tuple[str, str], str]) -> Iterator[tuple[Fault, str]]:
    """Yield each fault with the test that failed; the test that failed the time before runs first, alone."""
    for _, of_file in itertools.groupby(chosen, key=lambda fault: fault.file):
        sound: set[str] = set()
        for fault in of_file:
            hint = before.get((fault.file, fault.what), "")
            failed = trial.failed(fault, [hint]) if "::" in hint else ""
            failed = failed or trial.failed(fault, fault.tests)
            sound |= {failed} if "::" in failed else set(fault.tests) if failed else set()
            yield fault, failed
        if sound:
            trial.check_sound(sound)


def named(words: Sequence[str], every: Sequence[Fault]) -> Iterator[Fault]:
    """Yield the faults of files whose path has one of the words; of all files without words."""
    for word in words or ("",):
        found = [fault for fault in every if word in fault.file]
        if not found:
            raise SystemExit(f"No file with faults has {word!r} in its path.")
        yield from found


def main(words: Sequence[str]) -> None:
    """Try all faults, or those of some files; write the results, and end with 1 where one lives without a reason."""
    every, parts = faults(), [word for word in words if word != UNTRIED]
    rows = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    known = {(row["file"], row["what"]): row["failed"] for row in rows}
    chosen = list(dict.fromkeys(named(parts, every)))  # in the order of the words
    if UNTRIED in words:
        chosen = [fault for fault in chosen if (fault.file, fault.what) not in known]
    for name in LIBRARIES:
        importlib.import_module(name)
    wrong, noticed = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary, "copy")
        copied(scratch)
        for fault in every:
            fault.put_in((scratch / fault.file).read_text(encoding="utf-8"))  # before anything is run
        for fault, failed in tried(chosen, Trial(scratch, Path(temporary, "log")), known):
            known[fault.file, fault.what] = failed
            write_results(every, known)
            noticed += bool(failed)
            if bool(failed) == bool(fault.lives):
                wrong.append(
                    f"{fault.file}: {fault.what}: {'noticed, so take out `lives`' if failed else 'no test notices'}"
                )
    print("\n".join([*wrong, f"{noticed} of {len(chosen)} faults are noticed."]))
    raise SystemExit(bool(wrong))


def write_results(every: Sequence[Fault], found: Mapping[tuple[str, str], str]) -> None:
    """Write what failed, in the order of the faults; what has not been tried is left out."""
    rows = [
        {"file": f.file, "what": f.what, "failed": found[f.file, f.what]} for f in every if (f.file, f.what) in found
    ]
    RESULTS.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
