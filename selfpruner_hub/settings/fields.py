"""Dataclasses of settings: changed by name, checked, and described."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from selfpruner_hub.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")

_KINDS_OF_VALUES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "a name"),
    "bool": ((bool,), "true or false"),
    "int": ((int,), "a whole number"),
    "float": ((int, float), "a number"),
    "float | None": ((int, float, type(None)), "a number"),
    "float | tuple[float, ...]": ((int, float, list, tuple), "a number or a list of numbers"),
    "tuple[str, ...]": ((list, tuple), "a list of names"),
}
"""By the annotation of a field: the types of its values, and their name in errors."""


class Rules(NamedTuple):
    """Values that the fields of a dataclass of settings may have."""

    ranges: Mapping[str, tuple[float, float]] = {}
    """Smallest and largest number, by field; of a list, those of each of its numbers."""
    choices: Mapping[str, tuple[str, ...]] = {}
    """Known names, by field."""
    parts: Mapping[str, Rules] = {}
    """Rules of the fields that are dataclasses of settings themselves."""
    what: str = "setting"
    """Name of a field in errors."""
    prefix: str = ""
    """Text before the name of a field in errors."""


def with_changes(settings: S, changes: Mapping[str, Any], rules: Rules) -> S:
    """Change some settings and check all of them.

    Args:
        settings: Settings to begin with.
        changes: New values by name. A dataclass of settings is replaced by another one, or changed by a mapping.
        rules: Rules of the values.

    Returns:
        The checked settings.

    Raises:
        UserError: A name is unknown, or a value is out of its range.
    """
    names = [f.name for f in fields(settings)]
    if unknown := sorted(set(changes) - set(names)):
        raise UserError(
            f"Unknown {rules.what} {', '.join(rules.prefix + name for name in unknown)}.",
            f"Known: {', '.join(rules.prefix + name for name in names)}.",
        )
    values = {
        name: with_changes(getattr(settings, name), value, rules.parts[name])
        if name in rules.parts and isinstance(value, Mapping)
        else value
        for name, value in changes.items()
    }
    changed = replace(settings, **values)
    _check_fields(changed, rules)
    return changed


def _check_fields(settings: DataclassInstance, rules: Rules) -> None:
    for f in fields(settings):
        name, value = f"{rules.prefix}{f.name}", getattr(settings, f.name)
        if f.name in rules.parts:
            kind: Any = type(f.default)
            if not isinstance(value, kind):
                raise UserError(f"{name} must be a {kind.__name__} or a mapping of its fields; got {value!r}.")
            _check_fields(value, rules.parts[f.name])
            continue
        types, called = _KINDS_OF_VALUES[str(f.type)]
        limits, choices = rules.ranges.get(f.name), rules.choices.get(f.name, ())
        remedy = f"Choose from: {', '.join(choices)}." if choices else ""
        fits = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
        if not fits or (limits and value is not None and not _in_range(value, *limits)):
            limited = f" from {limits[0]:g} to {limits[1]:g}" if limits else ""
            raise UserError(f"{name} must be {called}{limited}; got {value!r}.", remedy)
        words = [value] if isinstance(value, str) else value
        if choices and not (words and set(map(str, words)) <= set(choices)):
            raise UserError(f"Unknown {name} {value!r}.", remedy)


def _in_range(value: Any, low: float, high: float) -> bool:
    numbers = list(value) if isinstance(value, (list, tuple)) else [value]
    return bool(numbers) and all(
        isinstance(number, (int, float)) and not isinstance(number, bool) and low <= number <= high
        for number in numbers
    )


@dataclass(frozen=True)
class DescribedSetting:
    """A field of a dataclass of settings, as users are told of it."""

    name: str
    """Its name; of a field of a field, both names with a dot between them."""
    kind: str
    """What its values are, such as `a whole number`."""
    default: Any
    """JSON value."""
    meaning: str
    """Its docstring, in one line."""


def described_fields(
    cls: type[DataclassInstance], values: Mapping[str, Any] | None = None, prefix: str = ""
) -> list[DescribedSetting]:
    """List the fields of a dataclass of settings with their meaning, which is read from its source.

    Args:
        cls: Dataclass; each field has a docstring and a default.
        values: JSON values by name, given as defaults; None takes those of the fields.
        prefix: Text before the names.

    Returns:
        The settings, in the order of the fields. In place of a field that is such a dataclass itself, its fields.
    """
    meanings = {name: text for base in reversed(cls.__mro__) if is_dataclass(base) for name, text in _meanings(base)}
    defaults = asdict(cls()) if values is None else values
    described: list[DescribedSetting] = []
    for f in fields(cls):
        name, value = f"{prefix}{f.name}", defaults[f.name]
        if is_dataclass(f.default) and not isinstance(f.default, type):
            described += described_fields(type(f.default), value, f"{name}.")
        else:
            described.append(DescribedSetting(name, _KINDS_OF_VALUES[str(f.type)][1], value, meanings.get(f.name, "")))
    return described


def _meanings(cls: type) -> list[tuple[str, str]]:
    (defined,) = ast.parse(inspect.getsource(cls)).body
    return [
        (ast.unparse(field.target), " ".join(ast.literal_eval(text.value).split()))
        for field, text in pairwise(getattr(defined, "body", []))
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    ]
