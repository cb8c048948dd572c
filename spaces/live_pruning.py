"""Live pruning of a small model: the search runs in a thread, and its state is read from its journal."""

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
from engines import load_lock
from engines.pytorch import fast_dtype
from model_source import UnavailableError, record, shown
from record_tables import header, lines, removed
from tokens import encode_prompt

SMALL = 400_000_000
"""Maximum number of parameters of a parent that is pruned live; for a larger one, `STAND_IN` is pruned."""
STAND_IN = "HuggingFaceTB/SmolLM2-135M-Instruct"
PRUNING_SECONDS = 600
"""Time limit of one pruning run, in seconds."""
MOST_EVALUATIONS = 16
TEXT = {"data": "self", "window": 64, "calibration_tokens": 2_048, "fisher_tokens": 2_048, "fitness_tokens": 512}
"""Settings of the text: the model generates it, and little of it, to save time."""
LIVE_SETTINGS = {
    "schedule": {"population": 2, "crossover": 2, "mutation": 4, "first_share": 0.5, "survivors": 0.5},
    "repair": "output",
}
PROMPT = "What is the capital of France?"

busy = threading.Lock()
"""Lock that is held during a pruning run: answers are slower then, and the page says so."""


class _StoppedError(Exception):
    """The visitor left, or the time limit was reached."""


@dataclass
class PruningState:
    """State of a pruning run."""

    stage: str = "loading the model"
    share: float = 0.0
    """Share of the stage that is done, in [0, 1]."""
    journal: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    pruned: Any = None
    """The `PrunedModel`; None until the run has ended."""
    error: Exception | None = None


def name() -> str:
    """Return the directory or Hub repository of the model that is pruned."""
    small = int(record()["parameters"]["dense"]) <= SMALL
    return os.environ.get("LIVE_MODEL") or (shown().parent if small else STAND_IN)


def called() -> str:
    """Return the name of that model for visitors, without a path."""
    return str(record()["base_model"] if name() == shown().parent else name()).rpartition("/")[2]


@cache
def _pruner() -> Any:
    try:
        from selfpruner_hub import AutoPruner
        from selfpruner_hub.errors import SelfPrunerError
    except ImportError as error:
        raise UnavailableError("Live pruning needs the package selfpruner-hub, which is not installed here.") from error
    try:
        revision = shown().parent_revision if name() == shown().parent else None
        return AutoPruner.from_pretrained(name(), dtype=fast_dtype(), revision=revision)
    except SelfPrunerError as error:
        raise UnavailableError("The model to prune cannot be loaded here.") from error


def prune(beta: float, evaluations: int, proposer: str) -> Iterator[PruningState]:
    """Prune the small model.

    Args:
        beta: Mean share of the prunable weights to remove, 0 < β < 1.
        evaluations: Length of the search in full-evaluation equivalents, at most `MOST_EVALUATIONS`.
        proposer: Name of the proposer, `self` or `evolution`.

    Yields:
        The state of the run, twice a second.

    Raises:
        UnavailableError: Another visitor is pruning, the time limit is reached, or pruning fails.
    """
    if not busy.acquire(blocking=False):
        raise UnavailableError("Someone else is pruning right now. Try again in a few minutes.")
    run, stop, started = PruningState(), threading.Event(), time.perf_counter()
    settings = {"proposer": proposer, "evaluations": min(evaluations, MOST_EVALUATIONS)}
    worker = threading.Thread(target=_work, args=(run, stop, beta, settings), daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            yield run
            worker.join(0.5)
            run.seconds = time.perf_counter() - started
            if run.seconds > PRUNING_SECONDS:
                stop.set()
        yield run
    finally:  # also when the visitor has left: Gradio then closes this on its event loop, so it waits for nothing
        stop.set()
    if isinstance(run.error, UnavailableError):
        raise run.error
    if isinstance(run.error, _StoppedError):
        raise UnavailableError(f"Stopped after {PRUNING_SECONDS} s. Try fewer evaluations.")
    if run.error is not None:
        raise UnavailableError(f"Pruning failed ({type(run.error).__name__}).") from run.error


def _work(run: PruningState, stop: threading.Event, beta: float, settings: dict[str, Any]) -> None:
    """Prune until the end, or until `stop` is set, and keep `run` up to date."""
    with tempfile.TemporaryDirectory() as directory:
        journal, read = Path(directory) / "search.jsonl", 0.0

        def look() -> None:
            run.journal = lines(journal.read_text(encoding="utf-8")) if journal.is_file() else []

        def progress(what: str, done: float, total: float) -> None:
            nonlocal read
            if stop.is_set():
                raise _StoppedError
            run.stage, run.share = what, min(1.0, done / total) if total else 0.0
            if time.monotonic() - read > 0.5:
                look()
                read = time.monotonic()

        try:
            with load_lock:
                progress(run.stage, 0, 1)  # another model may have been loaded for long
                pruner = _pruner()
            run.pruned = pruner.prune(
                beta, run_dir=Path(directory), progress=progress, **settings, **TEXT, **LIVE_SETTINGS
            )
        except Exception as error:
            run.error = error
        finally:
            look()
            busy.release()


def best(run: PruningState) -> tuple[dict[str, list[int]], float] | None:
    """Return widths and fitness of the best plan so far among those scored on all windows; None before the first."""
    scored = [r for r in run.journal if r.get("kind") == "score" and r["share"] == 1 and r["fitness"] is not None]
    lowest = min(scored, key=lambda r: r["fitness"], default=None)
    return (lowest["widths"], lowest["fitness"]) if lowest else None


def removed_by_best(run: PruningState) -> Any:
    """Return the percentage that the best plan so far removes from each layer; empty before there is a plan."""
    plan = best(run)
    widths = plan[0] if plan else {}
    return removed(widths, (), header(run.journal).get("shape")) if plan else removed({}, (), None)


@torch.inference_mode()
def sample(run: PruningState) -> str:
    """Return the pruned model's answer to `PROMPT`."""
    model, tokenizer = run.pruned.model, run.pruned.tokenizer
    inputs = encode_prompt(tokenizer, PROMPT)
    written = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    return str(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()
