"""What is published of a saved model: its files, pictures of its search, its exports; complete, or refused."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.hub.card import CHAT_TEMPLATE, render_card
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.hub.privacy import check_private
from selfpruner_hub.search.journal import FILE_NAME as JOURNAL_NAME
from selfpruner_hub.storage.export_record import read_export
from selfpruner_hub.storage.layout import EXPORTS, PLOTS
from selfpruner_hub.storage.model_record import FILE_NAME, Record, read_record
from selfpruner_hub.storage.staging import save_directory

CARD = "README.md"
NEEDED = ("config.json", "modeling_selfpruned.py", FILE_NAME)
PATTERNS = (
    *NEEDED,
    *("model*.safetensors", "model.safetensors.index.json", "generation_config.json", JOURNAL_NAME),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
"""What is ours in a repository, beside the card, the pictures and the exports. Whatever else lies in the directory
stays at home, and whatever else is in the repository is left alone."""
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*")
"""Published too, where they lie beside the model; never deleted from a repository."""


@dataclass(frozen=True)
class Bundle:
    """Files of one saved model, by their path in a repository; the card is not among them yet."""

    record: Record
    files: dict[str, Path]
    pictures: dict[str, bytes]
    exports: tuple[str, ...]
    """Formats, each a folder of `files`."""

    @property
    def chat(self) -> bool:
        """Whether the model came with a chat template."""
        return CHAT_TEMPLATE in self.files

    @property
    def weights(self) -> dict[str, Path]:
        """Those of `files` that exports are made from."""
        return {name: path for name, path in self.files.items() if fnmatch(name, "model*.safetensors")}


def collect(directory: Path) -> Bundle:
    """Find what is to be published.

    Args:
        directory: A saved model; exports of it stand in folders that are named after their formats.

    Returns:
        Its files, with pictures drawn from its journal.

    Raises:
        SavedModelError: The model or one of its exports is not whole, or an export is of another model.
    """
    record = read_record(directory)
    files = _matching(directory, (*PATTERNS, *LICENCES))
    _check_whole(directory, files)
    exports = tuple(name for name in EXPORTS if (directory / name).is_dir())
    for name in exports:
        check_export(directory, name, record)
        files |= {
            path.relative_to(directory).as_posix(): path
            for path in sorted((directory / name).rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
    return Bundle(record, files, _pictures(directory), exports)


def write_card(directory: Path, repo_id: str, output: Path) -> None:
    """Write the card that publishing would put beside a model, with its pictures.

    Args:
        directory: A saved model.
        repo_id: Where it is, or will be, published.
        output: The directory of the card; `README.md` and the pictures in it are replaced.

    Raises:
        SavedModelError: The directory holds no whole pruned model.
        UserError: The card holds a secret.
        OutputError: It cannot be written.
    """
    bundle = collect(directory)
    card = render_card(bundle.record, repo_id, pictures=list(bundle.pictures), exports=bundle.exports, chat=bundle.chat)
    files = {CARD: card.encode(), **bundle.pictures}
    check_private(files, directory)
    with save_directory(output) as staging:
        for name, content in files.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)


def check_export(directory: Path, name: str, record: Record) -> None:
    """Refuse an export that is not one of this model.

    Args:
        directory: Of the model.
        name: The format.
        record: Of the model.

    Raises:
        SavedModelError: The folder holds no export, one of another format, or one of another model.
    """
    read_export(directory / name, name)
    made_from = read_record(directory / name)
    if replace(made_from, metrics={}) != replace(record, metrics={}):  # what is measured later changes no weight
        raise SavedModelError(
            f"{str(directory / name)!r} is an export of another model than {str(directory)!r} holds.",
            f"Delete it, then push with --with {name}.",
        )


def is_ours(name: str) -> bool:
    """Whether a file of a repository, by its path there, is one that publishing writes."""
    folder = name.partition("/")[0]
    return "/" in name and folder in (PLOTS, *EXPORTS) or any(fnmatch(name, pattern) for pattern in PATTERNS)


def _matching(directory: Path, patterns: Iterable[str]) -> dict[str, Path]:
    found = (path for pattern in patterns for path in sorted(directory.glob(pattern)) if path.is_file())
    return {path.relative_to(directory).as_posix(): path for path in found}


def _check_whole(directory: Path, files: dict[str, Path]) -> None:
    index = files.get("model.safetensors.index.json")
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SavedModelError(f"{index} is damaged.", "Save the model again.") from error
    needed = [*NEEDED, *(sorted(shards) or ["model.safetensors"])]
    if missing := [name for name in needed if name not in files]:
        raise SavedModelError(f"{str(directory)!r} is not a whole model: {missing[0]} is missing.", "Save it again.")
    for name in needed[len(NEEDED) :]:
        try:
            with safe_open(files[name], framework="numpy"):
                pass  # opening compares the header with the size of the file
        except (SafetensorError, OSError) as error:
            raise SavedModelError(f"{files[name]} is damaged or cut off.", "Save the model again.") from error


def _pictures(directory: Path) -> dict[str, bytes]:
    """PNGs by their path in the repository; none where there is no journal to draw them from."""
    journal = directory / JOURNAL_NAME
    if not journal.is_file() or not journal.stat().st_size:
        return {}
    with tempfile.TemporaryDirectory() as temporary:
        drawn = plot_search(directory, Path(temporary), formats=("png",))
        return {f"{PLOTS}/{path.name}": path.read_bytes() for path in drawn}
