"""The lines of a journal, as dataclasses, and their form as JSON objects in its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from selfpruner_hub.plans.budget import Rates
from selfpruner_hub.plans.plan import Plan, plan_of, widths_of
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.proposers import Operation, Proposal
from selfpruner_hub.storage.versioned_json import fits


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
    """The seed plans were made; some of them come from measurements."""

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
class CheckLine:
    """A plan was scored on unseen text."""

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


JournalLine = SeedsLine | AskLine | ScoreLine | CheckLine | ProbeLine | RoundLine
L = TypeVar("L", bound=JournalLine)
_KINDS: dict[str, type[JournalLine]] = {
    "seeds": SeedsLine, "ask": AskLine, "score": ScoreLine, "check": CheckLine, "probe": ProbeLine, "round": RoundLine,
}  # fmt: skip


def filed(line: JournalLine) -> dict[str, Any]:
    """Return the JSON object of a line, as it stands in the file."""
    (kind,) = (name for name, of in _KINDS.items() if of is type(line))
    record: dict[str, Any] = {"kind": kind}
    for field in fields(line):
        name, write, _ = _FORMS.get(field.name, (field.name, _same, _same))
        record[name] = write(getattr(line, field.name))
    return record


def line_of(record: dict[str, Any]) -> JournalLine:
    """Rebuild a line from its JSON object; other keys are ignored.

    Args:
        record: Object of a line of the file.

    Returns:
        The line.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: It is not the object of a line, or a value is of another type.
    """
    kind, values = _KINDS[record["kind"]], {}
    for field in fields(kind):
        name, _, read = _FORMS.get(field.name, (field.name, _same, _same))
        values[field.name] = read(record[name])
    line = kind(**values)
    if not fits(line, kind):
        raise ValueError("a value is of another type")
    return line


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
