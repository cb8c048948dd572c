"""Strict reading of this package's JSON files: no values that are no JSON, known versions and keys, and their types."""

from __future__ import annotations

import functools
import json
import math
import types
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, NewType, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from selfpruner_hub.errors import SavedModelError

LARGEST = 2**63
"""Bound of the whole numbers that are read: larger ones are no counts."""
REMEDY = "Save or download the model again."
Count = NewType("Count", int)
"""Type hint of a whole number that is not negative."""
Amount = NewType("Amount", float)
"""Type hint of a number that is not negative."""


def parse_json(text: str | bytes) -> Any:
    """Read JSON of this package.

    Args:
        text: Content of a file or of a line.

    Returns:
        The value.

    Raises:
        ValueError: It is no JSON, is nested too deep, or holds a number that is not finite or far too large.
    """
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite, parse_int=_whole)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def check_writable_text(value: Any) -> None:
    """Raise `ValueError` if a value from JSON holds half of a character, which no file takes."""
    json.dumps(value, ensure_ascii=False).encode()


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number")
    return number


def _whole(text: str) -> int:
    if len(text) > len(str(LARGEST)) or abs(number := int(text)) >= LARGEST:
        raise ValueError("a number is too large")
    return number


def parse_versioned(
    text: str,
    source: str,
    version: int,
    kind: type,
    inner: Mapping[str, Any] | None = None,
    may_lack: Collection[str] = (),
) -> dict[str, Any]:
    """Read one of this package's JSON files strictly: all keys and no others, of a known version, with their types.

    Args:
        text: Content of the file.
        source: Name of the file, for error messages.
        version: Schema version that the file must have.
        kind: Dataclass of the content; its fields are the keys, `schema_version` among them.
        inner: Types of fields that the dataclass leaves open, by the name of the field.
        may_lack: Keys that files of earlier versions of this package lack; the dataclass has a default for each.

    Returns:
        The values by key.

    Raises:
        SavedModelError: The text is not such a file.
    """
    try:
        values: dict[str, Any] = parse_json(text)
        check_writable_text(values)
        schema = values.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise SavedModelError(f"{source} is damaged: {error}.", REMEDY) from error
    if schema != version or isinstance(schema, bool):
        raise SavedModelError(
            f"{source} has schema version {schema!r}; this version reads {version}.",
            "Install a matching selfpruner-hub.",
        )
    expected = {**get_type_hints(kind), **(inner or {})}
    if unknown := (set(values) ^ {field.name for field in fields(kind)}) - ({*may_lack} - set(values)):
        raise SavedModelError(f"{source} has unknown or missing keys: {', '.join(sorted(unknown))}.")
    for name, value in values.items():
        if not fits(value, expected[name]):
            raise SavedModelError(f"{source} is damaged: its {name} has a wrong value.", REMEDY)
    return values


def fits(value: Any, expected: Any) -> bool:
    """Return whether a value is of a type, with all that it contains.

    Args:
        value: Value from JSON, or a dataclass that was made of such values.
        expected: Type hint: `Any`, a class, `Count`, `Amount`, a union, a dict, a list, a tuple, a `TypedDict` (whose
            further keys may hold anything) or a dataclass. A list passes for a tuple, an object of JSON for a
            dataclass, a whole number for a float, and no bool for a number.

    Returns:
        Whether it fits.
    """
    origin, inner = get_origin(expected) or expected, get_args(expected)
    if origin is Any:
        return True
    if origin in (Count, Amount):
        return fits(value, origin.__supertype__) and value >= 0
    if origin in (Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    if is_typeddict(origin) or is_dataclass(origin):
        return _has_fields(value, origin)
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            return False
        hints = (inner[0],) * len(value) if origin is list or Ellipsis in inner else inner
        return len(hints) == len(value) and all(map(fits, value, hints))
    if isinstance(value, bool):
        return origin is bool
    return isinstance(value, (int, float) if origin is float else origin)


def _has_fields(value: Any, expected: Any) -> bool:
    """Return whether an object of JSON, or a dataclass, has the fields of a class with their types."""
    fields = vars(value) if isinstance(value, _instances(expected)) else value
    if not isinstance(fields, dict):
        return False
    hints, needed = _fields_of(expected)
    return needed <= fields.keys() and all(fits(fields[name], hint) for name, hint in hints.items() if name in fields)


def _instances(expected: Any) -> tuple[type, ...]:
    """Return the class of instances that pass for an object of JSON: none for a `TypedDict`."""
    return () if is_typeddict(expected) else (expected,)


@functools.cache  # evaluating type hints takes as long as reading a line
def _fields_of(expected: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the types of the fields of a `TypedDict` or a dataclass, and the names of those that must be there."""
    if is_typeddict(expected):
        # `__required_keys__` does not see NotRequired in annotations that are text.
        marked = get_type_hints(expected, include_extras=True)
        needed = {name for name, hint in marked.items() if get_origin(hint) is not NotRequired}
    else:
        needed = {field.name for field in fields(expected) if field.default is field.default_factory is MISSING}
    return get_type_hints(expected), frozenset(needed)
