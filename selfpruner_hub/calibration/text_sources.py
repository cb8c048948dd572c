"""Read texts from files and from the Hub, and tokenize them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import Message
from selfpruner_hub.errors import DataError

GENERATED = ("chat", "self")
"""Sources that the dense model writes: conversations through its chat template, or plain text from its start token."""
HUB_SOURCES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "test": "test"}),
    "c4": ("allenai/c4", "en", {"train": "train", "test": "validation"}),
}
"""Repository, configuration and names of the splits of each source on the Hub."""


def start_ids(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Token ids that the tokenizer puts before a text: BOS where it adds one, and none for most tokenizers.

    Models that were trained with such a start read text badly without it (Gemma's predictions collapse).
    """
    if tokenizer is None:
        return []
    whole, bare = (
        list(tokenizer("a", add_special_tokens=added, verbose=False)["input_ids"]) for added in (True, False)
    )
    before = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), 0)
    return whole[:before]


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Token ids of the concatenated texts, at most `limit`; no further text is read."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= limit:
            break
    return ids[:limit]


Entry = str | list[Message]
"""A text, or a conversation."""


def entries(source: Any, split: str = "train") -> Iterator[Entry]:
    """Read the texts and conversations of a source.

    Args:
        source: Key of `HUB_SOURCES`; path to a `.txt` (one text) or a `.jsonl` (one object per line, with a text under
            `text` or a conversation under `messages`); or iterable of texts, conversations or such objects, for
            example a `datasets.Dataset`.
        split: `"train"` or `"test"`, for sources on the Hub.

    Yields:
        A text, or the messages of a conversation.

    Raises:
        DataError: The source cannot be read, or contains anything else.
    """
    if isinstance(source, str) and source in HUB_SOURCES:
        yield from _hub_texts(source, split)
    elif isinstance(source, (str, Path)):
        yield from _file_entries(source)
    else:
        for number, value in enumerate(source, 1):
            yield _entry(value, f"data, entry {number}")


def name_of(source: Any) -> str:
    """Name of a source for records; for a file, without its directory."""
    if isinstance(source, str) and source in (*HUB_SOURCES, *GENERATED):
        return source
    return Path(source).name if isinstance(source, (str, Path)) else type(source).__name__


def _entry(value: Any, where: str) -> Entry:
    if isinstance(value, Mapping):
        value = value.get("messages", value.get("text"))
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return list(value)
    raise DataError(
        f'{where}: expected a text, or an object with a text under "text" or a conversation under "messages".',
        'A conversation is a list of objects with a "role" and a "content".',
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("role"), str) and "content" in value


def _file_entries(source: str | Path) -> Iterator[Entry]:
    path = Path(source)
    if path.suffix not in {".txt", ".jsonl"}:
        raise DataError(
            f"Unknown data {str(source)!r}.",
            f"Use {', '.join((*HUB_SOURCES, *GENERATED))}, several with + between them, or a path to a .txt or .jsonl "
            "file.",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # skips a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"Cannot read the text {str(path)!r}: {reason}.") from error
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may contain other line breaks
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield _entry(value if isinstance(value, Mapping) else None, f"{path}, line {number}")


def _hub_texts(source: str, split: str) -> Iterator[str]:
    """Stream the texts of one of `HUB_SOURCES`; raises `DataError` if it cannot be loaded."""
    import datasets  # imported here because it takes a second, and local data do not need it

    repo, name, splits = HUB_SOURCES[source]
    try:
        stream = datasets.load_dataset(repo, name, split=splits[split], streaming=True)
        rows = iter(stream)
        first = next(rows)
    except Exception as error:  # the Hub client raises many types; all of them mean that there is no text
        raise DataError(
            f"Cannot load {repo} from the Hugging Face Hub ({type(error).__name__}).",
            'Check the network (or HF_ENDPOINT), or use data="self" or a path to a text file.',
        ) from error
    yield first["text"]
    for row in rows:
        yield row["text"]
