"""The journal of a search: `search.jsonl`, one JSON object per line, flushed to disk as it is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from selfpruner_hub.errors import OutputError, RunMismatchError

SCHEMA_VERSION = 1
FILE_NAME = "search.jsonl"

Record = dict[str, Any]


class Journal:
    """Append-only record of a search; opening an existing journal reads its records.

    The first line is a header with the settings of the search. An incomplete last line, left by a crash, is removed.

    Args:
        directory: Directory of `search.jsonl`; None keeps the records in memory.
        settings: Settings that change the course of the search, JSON-serialisable.

    Raises:
        RunMismatchError: The directory holds the journal of a search with other settings, or a damaged one.
        OutputError: The directory cannot be written.
    """

    def __init__(self, directory: Path | None, settings: Record) -> None:
        self.path = None if directory is None else directory / FILE_NAME
        self.records: list[Record] = []
        header = {"kind": "header", "schema_version": SCHEMA_VERSION, "settings": settings}
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.records = _read(self.path, repair=True)
            except OSError as error:
                raise OutputError(f"Cannot use the run directory {str(directory)!r}: {error.strerror}.") from error
        if not self.records:
            self.append(header)
        elif (found := self.records[0]) != json.loads(json.dumps(header)):
            raise RunMismatchError(
                f"{self.path} belongs to another search ({_difference(found, header)}).",
                "Use another run directory, or the same model, data and settings.",
            )

    def append(self, record: Record) -> None:
        """Write one record and flush it to disk.

        Args:
            record: JSON-serialisable object with the key `kind`.

        Raises:
            OutputError: The journal cannot be written.
        """
        line = json.dumps(record) + "\n"
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise OutputError(f"Cannot write {self.path}: {error.strerror}.") from error
        self.records.append(json.loads(line))

    def text(self) -> str:
        """Return all records as the text of the file."""
        return "".join(json.dumps(record) + "\n" for record in self.records)


def read_journal(path: Path) -> list[Record]:
    """Read a journal; an incomplete last line is ignored.

    Args:
        path: Path of `search.jsonl`.

    Returns:
        The records, the header first.

    Raises:
        RunMismatchError: The file is not a journal, or is damaged before its last line.
    """
    records = _read(path, repair=False)
    if not records or records[0].get("kind") != "header":
        raise RunMismatchError(f"{path} is not the journal of a search.")
    return records


def _read(path: Path, *, repair: bool) -> list[Record]:
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    records = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunMismatchError(f"{path} is damaged at line {number}.", "Use another run directory.") from error
        if not isinstance(record, dict):
            raise RunMismatchError(f"{path} is not the journal of a search.", "Use another run directory.")
        records.append(record)
    return records


def _difference(found: Record, wanted: Record) -> str:
    """Name the first settings that differ."""
    old, new = found.get("settings"), json.loads(json.dumps(wanted["settings"]))
    if not isinstance(old, dict) or found.get("schema_version") != SCHEMA_VERSION:
        return "written by another version"
    names = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{name}: {old.get(name)!r} there, {new.get(name)!r} here" for name in names[:2])[:400]
