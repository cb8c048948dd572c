"""Strict reading of this package's JSON files, which have a schema version."""

from __future__ import annotations

import json
from typing import Any

from selfpruner_hub.errors import SavedModelError


def parse_versioned(text: str, source: str, version: int, keys: set[str]) -> dict[str, Any]:
    """Read one of this package's JSON files strictly: all keys and no others, of a known version.

    Args:
        text: Content of the file.
        source: Name of the file, for error messages.
        version: Schema version that the file must have.
        keys: Names of all keys, `schema_version` among them.

    Returns:
        The values by key.

    Raises:
        SavedModelError: The text is not such a file.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        found = values.get("schema_version")
    except (ValueError, AttributeError) as error:
        raise SavedModelError(f"{source} is damaged: {error}.", "Save or download the model again.") from error
    if found != version:
        raise SavedModelError(
            f"{source} has schema version {found!r}; this version reads {version}.",
            "Install a matching selfpruner-hub.",
        )
    if unknown := set(values) ^ keys:
        raise SavedModelError(f"{source} has unknown or missing keys: {', '.join(sorted(unknown))}.")
    return values
