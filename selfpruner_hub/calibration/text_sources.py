"""Texts from files and from the Hub, and their tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from selfpruner_hub.errors import DataError

HUB_SOURCES = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", {"train": "train", "test": "test"}),
    "c4": ("allenai/c4", "en", {"train": "train", "test": "validation"}),
}
"""Repository, configuration and names of the splits of each source on the Hub."""


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Token ids of the texts one after another, at most `limit`; no text is read beyond them."""
    ids: list[int] = []
    for text in texts:
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= limit:
            break
    return ids[:limit]


def file_texts(path: Path) -> Iterator[str]:
    """Texts of a file: one of a `.txt`, one a line of a `.jsonl`; raises `DataError` where it cannot be read."""
    if path.suffix not in {".txt", ".jsonl"}:
        raise DataError(
            f"Unknown data {str(path)!r}.",
            f"Use {', '.join(HUB_SOURCES)}, self, or a path to a .txt or .jsonl file.",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")  # a byte order mark is not text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"Cannot read the text {str(path)!r}: {reason}.") from error
    if path.suffix == ".txt":
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines(): JSON strings may hold other line breaks
        if not line.strip():
            continue
        try:
            entry = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            entry = None
        if not isinstance(entry, str):
            raise DataError(f'{path}, line {number}: expected a JSON object with a text under the key "text".')
        yield entry


def hub_texts(source: str, split: str) -> Iterator[str]:
    """Texts of one of `HUB_SOURCES`, streamed; raises `DataError` where it cannot be loaded."""
    import datasets  # imported here: it takes a second, and local data do not need it

    repo, name, splits = HUB_SOURCES[source]
    try:
        stream = datasets.load_dataset(repo, name, split=splits[split], streaming=True)
        rows = iter(stream)
        first = next(rows)
    except Exception as error:  # the Hub client raises many kinds; all of them mean "no text"
        raise DataError(
            f"Cannot load {repo} from the Hugging Face Hub ({type(error).__name__}).",
            'Check the network (or HF_ENDPOINT), or use data="self" or a path to a text file.',
        ) from error
    yield first["text"]
    for row in rows:
        yield row["text"]
