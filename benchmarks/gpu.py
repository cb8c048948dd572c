"""Tests, seconds, memory and tokens a second on a machine with an NVIDIA GPU, in at most nine minutes.

Run: python benchmarks/gpu.py [--output DIRECTORY] [--seconds S] [--parts NAME …] [--tiny] [--device cpu]
DIRECTORY: where `gpu.json` goes, row by row (default benchmarks/).
S: seconds for everything; parts that do not fit are skipped, and the file says so (default 520).
--tiny: tiny models, to try the script; with `--device cpu` it needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_bench import NAME, PROTOCOL, Bench
from gpu_speed import exported, speed
from gpu_stages import copies, stages, writing
from protocol import write

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 520.0
FILES = ("tests/test_contract.py", "tests/exporters/test_to_tensorrt.py", "tests/exporters/test_verify.py",
         "tests/exporters/test_benchmark.py")  # fmt: skip
"""Files of the tests that need a GPU: to collect all others takes longer, and needs all that they import."""
TESTS = ("-m", "gpu", "-v", "-rfE", "-p", "no:cacheprovider", "--continue-on-collection-errors")
"""Arguments of pytest."""


def tests(bench: Bench, part: str) -> None:
    """Run the tests that need a GPU; each leaves a row as it ends, and pytest's last line is kept."""
    if importlib.util.find_spec("pytest") is None:
        bench.keep(part, not_installed="pytest is not installed.")
        return
    started, last, failed = time.monotonic(), "pytest said nothing", []
    command = [sys.executable, "-m", "pytest", *TESTS, *FILES]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in filter(None, map(str.strip, process.stdout or ())):
            last = line
            name, _, told = line.partition(" ")
            if "::" in name and told.split(" ")[0] in ("PASSED", "SKIPPED"):
                bench.keep(part, test=name, outcome=told.split(" ")[0].lower())
            elif line.startswith(("FAILED ", "ERROR ")):
                failed.append(line)
    bench.keep(part, summary=last, failures=failed, seconds=round(time.monotonic() - started, 1))


class Part(NamedTuple):
    """A part of the benchmark."""

    run: Callable[[Bench, str], None]
    seconds: float
    """Budget; a part gets more where the parts before it left some."""
    needs: float
    """Seconds below which it is not begun."""


PARTS = {
    "tests": Part(tests, 90, 30),
    "layer-8b": Part(partial(stages, name="8b-layer"), 40, 15),
    "speed-8b": Part(partial(speed, name="8b"), 115, 40),
    "stages-1b": Part(partial(stages, name="1b"), 40, 20),
    "stages-8b": Part(partial(stages, name="8b"), 130, 40),
    "writing-8b": Part(partial(writing, name="8b"), 40, 15),
    "copies": Part(partial(copies, name="8b"), 15, 5),
    "onnx": Part(partial(exported, runtime="onnx"), 30, 20),
    "tensorrt": Part(partial(exported, runtime="tensorrt"), 20, 15),
}
"""The parts, the most important first. Together they take `SECONDS`."""
Apart = Callable[[str, Bench], str]


def run(names: Sequence[str], bench: Bench, apart: Apart) -> None:
    """Run parts in turn until the time is over; each that cannot run, or does not end well, leaves a row that says so.

    Args:
        names: Names of the parts, in this order.
        bench: Device, sizes, results, and the end of all parts.
        apart: Function that runs a part in a process of its own, and returns why it did not end well, or "".
    """
    for index, name in enumerate(names):
        part, later = PARTS[name], sum(PARTS[other].seconds for other in names[index + 1 :])
        within = min(bench.left(), max(part.seconds, bench.left() - later))
        if within < part.needs:
            bench.keep(name, skipped=f"{max(within, 0):.0f} s were left, and it needs {part.needs:g} s")
        elif why := apart(name, Bench(bench.device, bench.tiny, bench.output, time.monotonic() + within)):
            bench.keep(name, stopped=why)


def command(name: str, bench: Bench) -> list[str]:
    """The command that runs one part alone."""
    options = ["--part", name, "--seconds", f"{bench.left():.1f}", "--device", str(bench.device)]
    return [sys.executable, __file__, *options, "--output", str(bench.output), *(["--tiny"] if bench.tiny else [])]


def in_a_process(name: str, bench: Bench) -> str:
    """Run a part in a process of its own, which frees the GPU at its end, and end it when its time is over.

    Args:
        name: Name of the part.
        bench: What it is given.

    Returns:
        Why it did not end well; "" if it did.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        # A session of its own: what the part has started ends with it.
        process = subprocess.Popen(command(name, bench), stderr=errors, env=environment, start_new_session=True)
        try:
            status = process.wait(within := bench.left())
        except subprocess.TimeoutExpired:
            return f"after {within:.0f} s, which are its budget"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        last_line = errors.read().strip().splitlines()[-1:] if status else []
    return f"with status {status}: {''.join(last_line)}"[:400] if status else ""


def main(words: Sequence[str] | None = None) -> int:
    """Run the benchmark, or one part of it; return the exit status."""
    parser = argparse.ArgumentParser(description="Measure on an NVIDIA GPU, in nine minutes.")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # what `command` runs
    options = parser.parse_args(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch sees no NVIDIA GPU here. To try the script: --tiny --device cpu.", file=sys.stderr)
        return 2
    if options.device == "cpu" and not options.tiny:
        print("The models of this benchmark are too large for a CPU. Add --tiny.", file=sys.stderr)
        return 2
    bench = Bench(torch.device(options.device), options.tiny, options.output, time.monotonic() + options.seconds)
    if options.part:
        PARTS[options.part].run(bench, options.part)
        return 0
    write(NAME, PROTOCOL, [], bench.output)
    run(options.parts, bench, in_a_process)
    return 0


if __name__ == "__main__":
    sys.exit(main())
