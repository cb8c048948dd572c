"""Read texts from files and from the Hub, and tokenize them."""

from __future__ import annotations

import inspect
import io
import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO

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
ROLES = ("system", "developer", "user", "assistant", "tool", "ipython", "function")
"""Roles of messages. Most templates write any other text as a role, too, and no model was trained on that."""
PIECE = 1 << 18
"""Maximum number of characters that are tokenized at once."""
_LONGEST_SHOWN = 80
"""Maximum number of characters of a source that a message shows."""
_JOINTS = tuple(re.compile(f"(?s).*(?:{joint})") for joint in (r"\S\n(?=\S)|\n(?= \S)", r"\S(?= \S)"))
"""A text up to its last line break between two lines (of which the second may begin with one space), or else up to the
last space between two words: pre-tokenizers of byte-level BPE always split there."""


def sources_of(data: Any) -> list[Any]:
    """Split a text argument into its sources: a string is split at `+`, unless a file has that name.

    Args:
        data: Text argument of `AutoPruner.prune`.

    Returns:
        Sources for `load_corpus`, without repeats.
    """
    return list(dict.fromkeys(data.split("+"))) if isinstance(data, str) and not _exists(data) else [data]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # the name is too long, for example the text itself
        return False


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


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Hash all that decides which tokens a tokenizer makes of texts and, through its template, of conversations."""
    if tokenizer is None:
        return ""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for passing in ("truncation", "padding"):  # of its last call
        state.pop(passing, None)
    whole = (state, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None), start_ids(tokenizer))
    return sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


def encode(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[int]:
    """Tokenize the concatenated texts; nothing is read or tokenized beyond the limit but the rest of a piece.

    Texts are tokenized one by one, and long ones in pieces (`pieces`). The token ids at a joint of pieces are those of
    the whole text for byte-level BPE. A SentencePiece tokenizer may start a piece with one more token, as it starts
    each text.

    Args:
        texts: Texts in order.
        tokenizer: Tokenizer; its special tokens are not added.
        limit: Maximum number of token ids.

    Returns:
        Token ids, at most `limit`.
    """
    ids: list[int] = []
    for piece in (piece for text in texts for piece in pieces(io.StringIO(text))):
        ids.extend(tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"])
        if len(ids) >= limit:
            break
    return ids[:limit]


def pieces(text: TextIO) -> Iterator[str]:
    """Read a text in pieces of at most `PIECE` characters, cut between two lines, or else between two words.

    Args:
        text: File or `io.StringIO` of the text.

    Yields:
        The pieces in order; a text that is shorter than `PIECE` is one piece.
    """
    rest = ""
    while len(piece := rest + text.read(PIECE - len(rest))) == PIECE:
        cut = next((match.end() for joint in _JOINTS if (match := joint.match(piece))), PIECE)
        yield piece[:cut]
        rest = piece[cut:]
    if piece:
        yield piece


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
        A text (a long `.txt` file in `pieces`), or the messages of a conversation, each with a text as its content.
        The test split of wikitext2 is one text, its rows joined by two line breaks as for published perplexities.
        Lone surrogates, which no tokenizer reads, are replaced by U+FFFD.

    Raises:
        DataError: The source cannot be read, or contains anything else.
    """
    if isinstance(source, str) and source in HUB_SOURCES:
        yield from _hub_texts(source, split)
    elif isinstance(source, (str, Path)):
        yield from _file_entries(source)
    else:
        _check_object(source)
        number = 0
        for number, value in enumerate(source, 1):
            yield _entry(value, f"data, entry {number}")
        if not number:
            raise DataError(f"data is a {type(source).__name__} without entries.", "An iterator gives them only once.")


def is_file(source: Any) -> bool:
    """Whether a source names a file that is there."""
    try:
        return isinstance(source, (str, Path)) and Path(source).is_file()
    except OSError:  # the name is too long, for example the text itself
        return False


def _check_object(source: Any) -> None:
    """Refuse objects that would be read as something else than was meant."""
    if isinstance(source, Mapping):  # a datasets.DatasetDict is one
        raise DataError(
            f"data is a {type(source).__name__} of {', '.join(map(repr, list(source)[:4])) or 'nothing'}, not a text.",
            'Give one of its parts, such as data["train"].',
        )
    if not isinstance(source, Iterable):
        raise DataError(
            f"data is a {type(source).__name__}, not a text.",
            "Give a name, a path, or a list of texts or conversations.",
        )
    if isinstance(source, Sequence) and source and all(map(_names_source, source)):
        joined = "+".join(map(str, source[:2]))
        raise DataError(
            f"data is a {type(source).__name__} of names of texts, where texts themselves belong.",
            f'Join the names by +, as in data="{joined}".',
        )
    if isinstance(source, Generator) and inspect.getgeneratorstate(source) != inspect.GEN_CREATED:
        raise DataError(
            "data is a generator that was read before.", "Give a new one, or a list, which can be read again."
        )
    if isinstance(source, Iterator) and not isinstance(source, Generator):  # nothing tells whether it was read before
        raise DataError(f"data is a {type(source).__name__}, which can be read once alone.", "Give a list of it.")


def _names_source(value: Any) -> bool:
    return is_file(value) or (isinstance(value, str) and value in (*HUB_SOURCES, *GENERATED))


def name_of(source: Any) -> str:
    """Name of a source for records; for a file, without its directory."""
    if isinstance(source, str) and source in (*HUB_SOURCES, *GENERATED):
        return source
    return Path(source).name if isinstance(source, (str, Path)) else type(source).__name__


def _entry(value: Any, where: str) -> Entry:
    if isinstance(value, Mapping):
        value = value.get("messages", value.get("text"))
    if isinstance(value, str):
        return _without_surrogates(value)
    if isinstance(value, Sequence) and value and all(map(_is_message, value)):
        return [_message(message, where) for message in value]
    raise DataError(
        f'{where}: expected a text, or an object with a text under "text" or a conversation under "messages".',
        f'A conversation is a list of objects with a "role" and a "content"; roles are {", ".join(ROLES)}.',
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and value.get("role") in ROLES and "content" in value


def _message(message: Mapping[str, Any], where: str) -> Message:
    """Return a message with the text of its content; refuse what a template might write as Python or leave out."""
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts = [_text_of(part) for part in parts] if isinstance(parts, list) else []
    strings = [text for text in texts if text is not None]
    if not texts or len(strings) < len(texts) or message.get("tool_calls"):
        raise DataError(
            f"{where}: a message holds something else than text (None, a number, an image or a call of a tool).",
            'Leave such conversations out, or give each "content" as a text, or as parts of {"type": "text"}.',
        )
    kept = {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
    return {**kept, "content": _without_surrogates("".join(strings))}  # a template may take an empty list for calls


def _text_of(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
    return text if isinstance(text, str) else None


def _without_surrogates(text: str) -> str:
    """Replace lone surrogates, such as half of an emoji that was cut off, as decoders replace what is no character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _unknown(source: Any) -> DataError:
    return DataError(
        f"Unknown data {_shown(source)}.",
        f"Use {', '.join((*HUB_SOURCES, *GENERATED))}, several with + between them, or a path to a .txt or .jsonl "
        "file; in Python also a list of texts.",
    )


def _shown(source: Any) -> str:
    """Return the start of a source, which may be a whole text, for messages."""
    text = str(source)
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")


def _file_entries(source: str | Path) -> Iterator[Entry]:
    path = Path(source)
    if path.suffix not in {".txt", ".jsonl"}:
        raise _unknown(source)
    try:
        with path.open(encoding="utf-8-sig") as file:  # skips a byte order mark
            if path.suffix == ".txt":
                yield from pieces(file)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _entry(_object(line), f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise DataError(f"Cannot read the text {_shown(path)}: {reason}.") from error


def _object(line: str) -> Mapping[str, Any] | None:
    """Return the JSON object of a line; None if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, Mapping) else None


def _hub_texts(source: str, split: str) -> Iterator[str]:
    """Stream the texts of one of `HUB_SOURCES`; raises `DataError` if they cannot be loaded, or not to the end."""
    import datasets  # imported here because it takes a second, and local data do not need it

    repo, name, splits = HUB_SOURCES[source]
    try:
        rows = (row["text"] for row in datasets.load_dataset(repo, name, split=splits[split], streaming=True))
        yield from ["\n\n".join(rows)] if (source, split) == ("wikitext2", "test") else rows
    except Exception as error:  # the Hub client raises many types; all of them mean that there is no text
        raise DataError(
            f"Cannot load {repo} from the Hugging Face Hub ({type(error).__name__}).",
            'Check the network (or HF_ENDPOINT), or use data="self" or a path to a text file.',
        ) from error
