"""A small model, pruned while a visitor watches: the search runs in a thread, its journal tells where it stands."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from answers import UnavailableError, encode, fast_dtype, record, shown
from facts import header, lines, removed

SMALL = 400_000_000
"""Parameters of the largest parent that is pruned here; for a larger one, `STAND_IN` is."""
STAND_IN = "HuggingFaceTB/SmolLM2-135M-Instruct"
SECONDS = 600
"""Longest that a visitor may prune."""
MOST_EVALUATIONS = 16
TEXT = {"data": "self", "window": 64, "calibration_tokens": 2_048, "fitness_tokens": 512}
"""Text that the model writes itself: little of it, so that it does not take long."""
SEARCH = {"population": 2, "crossover": 2, "mutation": 4, "first_share": 0.5, "survivors": 0.5, "accumulate": False}
PROMPT = "What is the capital of France?"

busy = threading.Lock()
"""Held while someone prunes: answers are slower then, and say so."""


class _StoppedError(Exception):
    """The visitor left, or took too long."""


@dataclass
class Run:
    """A search, as far as it has come."""

    stage: str = "loading the model"
    share: float = 0.0
    """Of the stage, from 0 to 1."""
    journal: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    pruned: Any = None
    """The `PrunedModel`, at the end."""
    error: Exception | None = None


def name() -> str:
    """The model that is pruned here."""
    small = int(record()["parameters"]["dense"]) <= SMALL
    return os.environ.get("LIVE_MODEL") or (shown().parent if small else STAND_IN)


def called() -> str:
    """Its name for people; a directory's says nothing."""
    return str(record()["base_model"] if name() == shown().parent else name()).rpartition("/")[2]


@cache
def _pruner() -> Any:
    try:
        from selfpruner_hub import AutoPruner
        from selfpruner_hub.errors import SelfPrunerError
    except ImportError as error:
        raise UnavailableError("Live pruning needs the package selfpruner-hub, which is not installed here.") from error
    try:
        return AutoPruner.from_pretrained(name(), dtype=fast_dtype())
    except SelfPrunerError as error:
        raise UnavailableError("The model to prune cannot be loaded here.") from error


def prune(beta: float, evaluations: int, proposer: str) -> Iterator[Run]:
    """Prune the small model.

    Args:
        beta: Mean fraction of weights to remove.
        evaluations: Budget of the search, in full-evaluation equivalents; at most `MOST_EVALUATIONS`.
        proposer: `self` or `evolution`.

    Yields:
        Where it stands, twice a second.

    Raises:
        UnavailableError: It cannot be done here, or failed.
    """
    if not busy.acquire(blocking=False):
        raise UnavailableError("Someone else is pruning right now. Try again in a few minutes.")
    run = Run()
    try:
        with tempfile.TemporaryDirectory() as directory:
            yield from _watch(run, Path(directory), beta, min(evaluations, MOST_EVALUATIONS), proposer)
    finally:
        busy.release()
    if isinstance(run.error, UnavailableError):
        raise run.error
    if isinstance(run.error, _StoppedError):
        raise UnavailableError(f"Stopped after {SECONDS} s. Try fewer evaluations.")
    if run.error is not None:
        raise UnavailableError(f"Pruning failed ({type(run.error).__name__}).") from run.error


def _watch(run: Run, directory: Path, beta: float, evaluations: int, proposer: str) -> Iterator[Run]:
    """Let a thread prune, and look at its journal until it ends, takes too long, or the visitor leaves."""
    stop, started, journal = threading.Event(), time.perf_counter(), directory / "search.jsonl"

    def report(what: str, done: float, total: float) -> None:
        if stop.is_set():
            raise _StoppedError
        run.stage, run.share = what, min(1.0, done / total) if total else 0.0

    def work() -> None:
        try:
            run.pruned = _pruner().prune(
                beta,
                proposer=proposer,
                evaluations=evaluations,
                run_dir=directory,
                progress=report,
                **TEXT,
                **SEARCH,
            )
        except Exception as error:
            run.error = error

    yield run
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.5)
            run.seconds = time.perf_counter() - started
            run.journal = lines(journal.read_text(encoding="utf-8")) if journal.is_file() else []
            if run.seconds > SECONDS:
                stop.set()
            yield run
    finally:
        stop.set()
        worker.join()


def best(run: Run) -> tuple[dict[str, list[int]], float] | None:
    """Widths and fitness of the best plan so far among those scored on all of the text."""
    scored = [r for r in run.journal if r.get("kind") == "score" and r["share"] == 1 and r["fitness"] is not None]
    found = min(scored, key=lambda r: r["fitness"], default=None)
    return (found["widths"], found["fitness"]) if found else None


def removed_by_best(run: Run) -> Any:
    """What the best plan so far removes from each layer, for a plot; empty before there is one."""
    found = best(run)
    widths = found[0] if found else {}
    return removed(widths, (), header(run.journal).get("shape")) if found else removed({}, (), None)


@torch.inference_mode()
def sample(run: Run) -> str:
    """What the pruned model answers to `PROMPT`."""
    model, tokenizer = run.pruned.model, run.pruned.tokenizer
    inputs = encode(tokenizer, PROMPT)
    written = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
