"""The journal of a search, `search.jsonl`: one JSON object a line, flushed to disk as it is written.

This module alone knows the format of the file; all others see the lines as dataclasses.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from selfpruner_hub.errors import OutputError, RunMismatchError
from selfpruner_hub.plans.budget import Rates
from selfpruner_hub.plans.plan import Plan, plan_of, widths_of
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.proposers import Operation, Proposal
from selfpruner_hub.settings import renamed

SCHEMA_VERSION = 1
JOURNAL_FILE = "search.jsonl"


@dataclass(frozen=True)
class Reply:
    """One proposal, and the plan that the projection to the budget made of it."""

    proposal: Proposal
    plan: Plan | None = None
    """None for a refusal."""
    moved: float | None = None
    """Mean distance by which the projection moved the rates; None for a refusal."""


@dataclass(frozen=True)
class SeedsLine:
    """The seed plans were made; measurements scale some of them."""

    rates: dict[str, Rates]
    """Rates by the name of the seed."""


@dataclass(frozen=True)
class AskLine:
    """A proposer was asked."""

    round: int
    attempt: int
    """Number of times that proposers were asked in this round before."""
    operation: Operation
    proposer: str
    """Name of the proposer."""
    random_state: tuple[int, ...]
    """Seed of the random generator that the proposer was given."""
    replies: tuple[Reply, ...]
    seconds: float


@dataclass(frozen=True)
class ScoreLine:
    """A plan was scored."""

    round: int
    origin: str
    """Source of the plan, as in `Scored`."""
    share: float
    """Share of the windows, in (0, 1]; the score costs as many full-evaluation equivalents."""
    fitness: float
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class ProbeLine:
    """The effects of small changes of a plan were measured."""

    round: int
    share: float
    """Cost in full-evaluation equivalents."""
    slopes: StepEffects
    plan: Plan
    seconds: float


@dataclass(frozen=True)
class RoundLine:
    """A round ended; the fields say where the search stands."""

    round: int
    operation: Operation
    counts: dict[str, int]
    """Number of this round's proposals that were accepted, refused, duplicate or replaced."""
    moved: float | None
    """Mean of `Reply.moved` in this round; None if no reply had rates."""
    best: float
    """Fitness of the best plan so far."""
    origin: str
    """Source of that plan."""
    spent: float
    """Evaluations spent, in full-evaluation equivalents."""
    tokens: int
    """Number of tokens that a language model read and wrote."""


JournalLine = SeedsLine | AskLine | ScoreLine | ProbeLine | RoundLine
L = TypeVar("L", bound=JournalLine)
_KINDS: dict[str, type[JournalLine]] = {
    "seeds": SeedsLine, "ask": AskLine, "score": ScoreLine, "probe": ProbeLine, "round": RoundLine,
}  # fmt: skip


class Journal:
    """Append-only journal of a search; opening an existing one reads its lines.

    The first line of the file is a header with the settings of the search. An incomplete last line, left by a crash, is
    removed.

    Args:
        directory: Directory of `search.jsonl`; None keeps the lines in memory.
        settings: Settings that change the course of the search, JSON-serialisable.

    Raises:
        RunMismatchError: The directory holds the journal of a search with other settings, or a damaged one.
        OutputError: The directory cannot be written.
    """

    def __init__(self, directory: Path | None, settings: dict[str, Any]) -> None:
        self.path = None if directory is None else directory / JOURNAL_FILE
        self.lines: list[JournalLine] = []
        self._texts: list[bytes] = []
        header = _text({"kind": "header", "schema_version": SCHEMA_VERSION, "settings": settings})
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._texts = _complete_lines(self.path, repair=True)
            except OSError as error:
                raise OutputError(f"Cannot use the run directory {str(directory)!r}: {error.strerror}.") from error
        if not self._texts or self.path is None:
            self._write(header)
            return
        found, wanted = _record(self._texts[0], self.path, 1), json.loads(header)
        if isinstance(found.get("settings"), dict):
            found["settings"] = renamed(found["settings"])
        if found != wanted:
            raise RunMismatchError(
                f"{self.path} belongs to another search ({_difference(found, wanted)}).",
                "Use another run directory, or the same model, data and settings.",
            )
        self.lines = _events(self._texts, self.path)

    def append(self, line: L) -> L:
        """Write one line and flush it to disk.

        Args:
            line: Event of the search.

        Returns:
            The line as a resumed search will read it.

        Raises:
            OutputError: The journal cannot be written.
        """
        text = _text(_filed(line))
        self._write(text)
        again = _event(type(line), json.loads(text))
        self.lines.append(again)
        return again

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
    if header.get("kind") != "header" or not isinstance(header.get("settings"), dict):
        raise RunMismatchError(f"{path} is not the journal of a search.")
    return header["settings"], _events(texts, path)


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
        record = json.loads(text)
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
            events.append(_event(_KINDS[record["kind"]], record))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RunMismatchError(f"{path} is damaged at line {number}.", "Use another run directory.") from error
    return events


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Name the first settings that differ."""
    old, new = found.get("settings"), wanted["settings"]
    if not isinstance(old, dict) or found.get("schema_version") != SCHEMA_VERSION:
        return "written by another version"
    names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names[:2])[:400]


# -- between dataclasses and the file ---------------------------------------------------------------------------------


def _text(record: dict[str, Any]) -> bytes:
    return json.dumps(record).encode("ascii")


def _filed(line: JournalLine) -> dict[str, Any]:
    """Return the JSON object of a line."""
    (kind,) = (name for name, of in _KINDS.items() if of is type(line))
    filed: dict[str, Any] = {"kind": kind}
    for field in fields(line):
        name, write, _ = _FORMS.get(field.name, (field.name, _same, _same))
        filed[name] = write(getattr(line, field.name))
    return filed


def _event(kind: type[L], record: dict[str, Any]) -> L:
    """Rebuild a line of this kind from its JSON object; other keys are ignored."""
    values = {}
    for field in fields(kind):
        name, _, read = _FORMS.get(field.name, (field.name, _same, _same))
        values[field.name] = read(record[name])
    return kind(**values)


def _filed_reply(reply: Reply) -> dict[str, Any]:
    if reply.plan is None:
        return asdict(reply.proposal)
    return {**asdict(reply.proposal), "widths": widths_of(reply.plan), "moved": reply.moved}


def _read_reply(record: dict[str, Any]) -> Reply:
    values = {field.name: record[field.name] for field in fields(Proposal)}
    if values["rates"] is not None:
        values["rates"] = _read_rates(values["rates"])
    proposal = Proposal(**{**values, "parents": tuple(values["parents"])})
    return Reply(proposal, plan_of(record["widths"]), record["moved"]) if "widths" in record else Reply(proposal)


def _read_rates(record: dict[str, Any]) -> Rates:
    return Rates(**{part: tuple(rates) for part, rates in record.items()})


def _read_seeds(record: dict[str, Any]) -> dict[str, Rates]:
    return {name: _read_rates(rates) for name, rates in record.items()}


def _filed_replies(replies: Sequence[Reply]) -> list[dict[str, Any]]:
    return [_filed_reply(reply) for reply in replies]


def _read_replies(records: Sequence[dict[str, Any]]) -> tuple[Reply, ...]:
    return tuple(_read_reply(record) for record in records)


def _same(value: Any) -> Any:
    return value


def _filed_fitness(value: float) -> float | None:
    return None if math.isinf(value) else value


def _read_fitness(value: float | None) -> float:
    return math.inf if value is None else float(value)


_FORMS: dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "rates": ("rates", lambda seeds: {name: asdict(rates) for name, rates in seeds.items()}, _read_seeds),
    "replies": ("replies", _filed_replies, _read_replies),
    "random_state": ("random_state", list, tuple),
    "fitness": ("fitness", _filed_fitness, _read_fitness),
    "best": ("best", _filed_fitness, _read_fitness),
    "plan": ("widths", widths_of, plan_of),
    "slopes": ("slopes", StepEffects.to_json, StepEffects.from_json),
}
"""By field, where the file has another form: the name of its key, and the functions that write and read its value."""
