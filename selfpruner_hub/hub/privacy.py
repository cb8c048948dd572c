"""Search of every file for tokens, keys and paths of this machine, before it is published."""

from __future__ import annotations

import json
import mmap
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from huggingface_hub import get_token

from selfpruner_hub.errors import UserError

_SECRET_NAMES = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)S?$")
"""Pattern of the names of environment variables whose values are searched for."""
_SHORTEST_SECRET = 8
"""Minimum length of a secret, in characters; shorter values would be found by chance."""
_FORMS = re.compile(
    rb"(?<!\w)hf_[A-Za-z0-9]{30,}"
    rb"|(?<![\w-])sk-[\w-]{20,}"
    rb"|https?://[^/\s:@\"']+:[^/\s:@\"']+@"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
"""Patterns of tokens and keys; only text is searched for them, since the bytes of weights could match by chance."""
_TEXT = {".json", ".jsonl", ".md", ".py", ".txt", ".jinja", ".yaml", ".xml", ".svg", ""}
_VOCABULARY = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"}
"""Vocabulary files, which are not searched for paths: parts of paths occur there as tokens."""


def check_private(files: Mapping[str, Path | bytes], directory: Path, tokens: Iterable[str | None] = ()) -> None:
    """Refuse to publish files that hold a secret or a path of this machine.

    Args:
        files: Files by their path in the repository, each as a path or as its content.
        directory: Directory of the files.
        tokens: Secrets that are not in the environment.

    Raises:
        UserError: A file holds a secret or a path; the message names the file and the kind of secret, not the secret.
    """
    secrets, paths = _secrets(tokens), _paths(directory)
    for name, source in files.items():
        place = PurePosixPath(name)
        with _opened(source) as data:
            needles = secrets if place.name in _VOCABULARY else {**secrets, **paths}
            leak = next((kind for needle, kind in needles.items() if data.find(needle) >= 0), None)
            if leak is None and place.suffix in _TEXT and _FORMS.search(data):
                leak = "what looks like a token or a key"
        if leak:
            raise UserError(f"{name} holds {leak}; nothing was published.", "Take it out, then push again.")


def _secrets(tokens: Iterable[str | None]) -> dict[bytes, str]:
    secrets = {value: f"the value of {name}" for name, value in os.environ.items() if _SECRET_NAMES.search(name)}
    secrets |= {token: "your Hub token" for token in (*tokens, get_token()) if token}
    return {form: kind for value, kind in secrets.items() if len(value) >= _SHORTEST_SECRET for form in _written(value)}


def _written(value: str) -> set[bytes]:
    """A value as it may stand in a file: as it is, escaped in JSON with and without other letters, or in an address."""
    escaped = (json.dumps(value, ensure_ascii=ascii_alone)[1:-1] for ascii_alone in (True, False))
    quoted = (quote(value, safe, errors="surrogateescape") for safe in ("", "/"))
    return {form.encode(errors="surrogateescape") for form in (value, *escaped, *quoted)}


def _paths(directory: Path) -> dict[bytes, str]:
    """Return paths that identify this machine; a folder right under the root counts only as part of a longer path."""
    place = directory.resolve()
    folders = {place, place.parent, Path.cwd(), Path.home()} | ({Path(sys.prefix)} - {Path(sys.base_prefix)})
    return {
        form: "a path of this machine"
        for folder in folders
        if len(folder.parts) > 1
        for form in _written(str(folder) if len(folder.parts) > 2 else f"{folder}{os.sep}")
    }


@contextmanager
def _opened(source: Path | bytes) -> Iterator[bytes | mmap.mmap]:
    """Give a file's bytes without reading the whole file."""
    if isinstance(source, bytes):
        yield source
    elif not source.stat().st_size:
        yield b""
    else:
        with source.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
