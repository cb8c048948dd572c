"""The journal of a search, `search.jsonl`: one JSON object a line, flushed to disk as it is written."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from selfpruner_hub.errors import OutputError, RunMismatchError
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan, plan_of
from selfpruner_hub.search.journal_lines import (
    AskLine,
    CheckLine,
    JournalLine,
    L,
    ProbeLine,
    ScoreLine,
    filed,
    line_of,
)
from selfpruner_hub.storage.versioned_json import check_writable_text, fits, parse_json

JOURNAL_VERSION = 1
JOURNAL_FILE = "search.jsonl"
logger = logging.getLogger(__name__)


class Journal:
    """Append-only journal of a search; opening an existing one reads its lines.

    The first line of the file is a header with the settings of the search. An incomplete last line, left by a crash, is
    removed. A search that another version of a library began goes on, with a warning.

    Args:
        directory: Directory of `search.jsonl`; None keeps the lines in memory.
        settings: Settings that change the course of the search, JSON-serialisable.
        versions: Versions of libraries by name; None names none.

    Raises:
        RunMismatchError: The directory holds the journal of a search with other settings, or a damaged one.
        OutputError: The directory cannot be written.
    """

    def __init__(
        self, directory: Path | None, settings: dict[str, Any], versions: Mapping[str, str] | None = None
    ) -> None:
        self.path = None if directory is None else directory / JOURNAL_FILE
        self.lines: list[JournalLine] = []
        self._texts: list[bytes] = []
        header = _text(
            {"kind": "header", "schema_version": JOURNAL_VERSION, "versions": versions or {}, "settings": settings}
        )
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._texts = _complete_lines(self.path, repair=True)
            except OSError as error:
                raise OutputError(f"Cannot use the run directory {str(directory)!r}: {error.strerror}.") from error
        if not self._texts or self.path is None:
            self._write(header)
            return
        stored, current = _record(self._texts[0], self.path, 1), json.loads(header)
        begun, present = stored.pop("versions", None), current.pop("versions")
        if stored != current:
            raise RunMismatchError(
                f"{self.path} belongs to another search ({_difference(stored, current)}).",
                "Use another run directory, or the same model, data and settings.",
            )
        if begun != present:
            before = begun if isinstance(begun, dict) else {}
            names = [name for name in present if before.get(name) != present[name]]
            changes = ", ".join(f"{name} {before.get(name, 'unknown')}, now {present[name]}" for name in names)
            logger.warning("%s was begun with other versions: %s. What they compute may differ.", self.path, changes)
        self.lines = _events(self._texts, self.path)

    def append(self, line: L) -> L:
        """Write one line and flush it to disk.

        Args:
            line: Event of the search.

        Returns:
            The line as a resumed search will read it.

        Raises:
            OutputError: The journal cannot be written.
            TypeError, ValueError: A value is none that JSON has, or of another type; nothing is written.
        """
        text = _text(filed(line))
        again = cast(L, line_of(parse_json(text)))  # before it is written: a line that is none would damage the file
        self._write(text)
        self.lines.append(again)
        return again

    def check_plans(self, budget: Budget) -> None:
        """Check that a search within a budget may have come to all plans that are there.

        Args:
            budget: Budget of the search.

        Raises:
            RunMismatchError: A plan is beyond the model or off the budget, or effects are of other layers.
        """
        for number, line in enumerate(self.lines, 2):
            plans = [reply.plan for reply in line.replies if reply.plan] if isinstance(line, AskLine) else []
            if isinstance(line, (ScoreLine, CheckLine, ProbeLine)):
                plans = [line.plan]
            effects = vars(line.slopes).values() if isinstance(line, ProbeLine) else ()
            if not all(_is_of(budget, plan) for plan in plans) or any(
                len(part) != budget.shape.num_layers for part in effects
            ):
                raise RunMismatchError(f"{self.path} is damaged at line {number}.", "Use another run directory.")

    def text(self) -> str:
        """Return all lines as the text of the file."""
        return b"".join(text + b"\n" for text in self._texts).decode("utf-8")

    def _write(self, text: bytes) -> None:
        if self.path is not None:
            try:
                with self.path.open("ab") as file:
                    file.write(text + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"Cannot write {self.path}: {error.strerror}.") from error
        self._texts.append(text)


def read_journal(path: Path) -> tuple[dict[str, Any], list[JournalLine]]:
    """Read a journal; an incomplete last line is ignored.

    Args:
        path: Path of `search.jsonl`.

    Returns:
        The settings in the header, and the lines after it.

    Raises:
        RunMismatchError: The file is not a journal, or is damaged before its last line.
    """
    texts = _complete_lines(path, repair=False)
    header = _record(texts[0], path, 1) if texts else {}
    if header.get("kind") != "header" or not fits(header.get("settings"), _Settings):
        raise RunMismatchError(f"{path} is not the journal of a search.")
    settings, events = header["settings"], _events(texts, path)
    layers = {len(line.plan.layers) for line in events if isinstance(line, (ScoreLine, CheckLine, ProbeLine))}
    try:
        dense = plan_of(settings["shape"])
        check_writable_text([header, *(line.origin for line in events if isinstance(line, ScoreLine))])
    except (KeyError, TypeError, ValueError) as error:
        raise RunMismatchError(f"{path} is damaged at line 1.") from error
    if layers - {len(dense.layers)}:
        raise RunMismatchError(f"{path} is damaged: its plans are of another number of layers than its model.")
    return settings, events


def _is_of(budget: Budget, plan: Plan) -> bool:
    """Whether a plan is within the model and on the budget; with a target, whether it reaches that."""
    if not budget.shape.contains(plan):
        return False
    beyond = budget.removed_share(plan) - budget.share
    return beyond >= -1e-9 if budget.target else abs(beyond) <= budget.tolerance + 1e-9


class _Shape(TypedDict):
    hidden_size: int
    head_dim: int
    queries_per_group: int
    intermediate_size: NotRequired[list[int]]
    num_experts: NotRequired[list[int]]
    num_key_value_heads: list[int]


class _Target(TypedDict):
    quantity: str
    value: float
    runtime: str


class _Settings(TypedDict):
    """Settings of a search that are read from its journal."""

    model: str
    beta: float
    fitness: str
    shape: _Shape
    target: NotRequired[_Target]


def _complete_lines(path: Path, *, repair: bool) -> list[bytes]:
    """Read the lines that end with a line break; with `repair`, cut the file off after the last of them."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.splitlines()


def _record(text: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = parse_json(text)
    except ValueError as error:
        raise RunMismatchError(f"{path} is damaged at line {number}.", "Use another run directory.") from error
    if not isinstance(record, dict):
        raise RunMismatchError(f"{path} is not the journal of a search.", "Use another run directory.")
    return record


def _events(texts: list[bytes], path: Path) -> list[JournalLine]:
    """Read all lines but the header."""
    events = []
    for number, text in enumerate(texts[1:], 2):
        record = _record(text, path, number)
        try:
            events.append(line_of(record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunMismatchError(f"{path} is damaged at line {number}.", "Use another run directory.") from error
    return events


def _difference(stored: dict[str, Any], current: dict[str, Any]) -> str:
    """Name the first settings that differ."""
    old, new = stored.get("settings"), current["settings"]
    if not isinstance(old, dict) or stored.get("schema_version") != JOURNAL_VERSION:
        return "written by another version"
    old, new = _flat(old), _flat(new)
    names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names[:2])[:400]


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by name; a field of a setting has both names, with a dot between them."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _text(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii")
