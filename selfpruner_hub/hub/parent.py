"""Where a dense model comes from: its licence, from its card or its GGUF file, and its commit on the Hub."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file, extract_commit_hash

FIELDS = ("license", "license_name", "license_link")
"""Keys in the metadata of model cards: a licence identifier of the Hub and, for the identifier `other`, a name and a
link."""

_DOWNLOAD = ("revision", "token", "cache_dir", "local_files_only")


def commit_of(name: str, **kwargs: Any) -> str:
    """Look up the commit that a model was loaded from.

    Args:
        name: Directory or Hub repository of the model.
        **kwargs: Keywords of `from_pretrained`, of which `revision`, `token`, `cache_dir`, `local_files_only` and
            `gguf_file` are used.

    Returns:
        The commit as 40 hexadecimal digits; empty for a directory, or where the Hub is out of reach.
    """
    if Path(name).is_dir():
        return ""
    try:
        path = cached_file(name, kwargs.get("gguf_file") or CONFIG_NAME, **_only(kwargs, _DOWNLOAD))
    except Exception:  # the Hub client raises many types, and the model is there already
        return ""
    return extract_commit_hash(path, None) or ""


def licence_of(name: str, **kwargs: Any) -> dict[str, str]:
    """Look up the licence of a model.

    Args:
        name: Directory or Hub repository of the model.
        **kwargs: Keywords of `from_pretrained`, of which `revision`, `token`, `cache_dir`, `local_files_only` and
            `gguf_file` are used.

    Returns:
        Values of the known `FIELDS`; empty where the model states no licence, or its card cannot be read.
    """
    try:
        if Path(name).is_dir() and kwargs.get("gguf_file"):
            return _of_gguf(Path(name) / kwargs["gguf_file"])
        return _of_card(name, **kwargs)
    except Exception:  # a card that is missing, damaged or unreachable must not stop pruning
        return {}


def _of_card(name: str, **kwargs: Any) -> dict[str, str]:
    local = Path(name).is_dir()
    path = Path(name) / "README.md" if local else Path(hf_hub_download(name, "README.md", **_only(kwargs, _DOWNLOAD)))
    metadata = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    licence = {field: str(value) for field in FIELDS if (value := getattr(metadata, field))}
    link = licence.get("license_link", "")
    if link and "://" not in link:  # relative to the parent's repository, which the pruned model is not in
        licence.pop("license_link")
        if not local:
            licence["license_link"] = f"https://huggingface.co/{name}/blob/main/{link.removeprefix('./')}"
    return licence


def _of_gguf(path: Path) -> dict[str, str]:
    """Search the bytes for the keys: a GGUF reader would parse the whole vocabulary first, which takes seconds."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        licence = {field: _string_of(data, f"general.{field.replace('_', '.')}".encode()) for field in FIELDS}
    return {field: value for field, value in licence.items() if value}


def _string_of(data: mmap.mmap, key: bytes) -> str:
    """Return the string under a key of a GGUF file: lengths are 64-bit, and type 8 is a string."""
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", 8)
    at = data.find(entry)
    if at < 0:
        return ""
    at += len(entry)
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode()


def _only(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}
