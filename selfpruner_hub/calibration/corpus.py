"""Text for calibration, search and measurement, as seeded windows of tokens with a record of where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import Conversation, conversation, has_chat_template
from selfpruner_hub.calibration.conversations import Distinct, packed, write_conversations
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.calibration.text_sources import GENERATED, HUB_SOURCES, Entry, encode, entries, name_of
from selfpruner_hub.errors import DataError
from selfpruner_hub.progress import Progress

T = TypeVar("T")
CONVERSATION_TOKENS = 100
"""Length of a conversation, expected before the first are written."""
ATTEMPTS = 4
"""Largest number of times that a model writes more conversations, where those before did not fill the windows."""
SPARE_SEED = 2**31
"""Added to the random seed of spare text that a model writes; a run's own seed is less."""


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens.

    Attributes:
        name: Where the text came from.
        windows: Token ids, `[N, W]`, int64.
        sha256: Hash of the token ids, as hexadecimal digits.
    """

    name: str
    windows: Tensor
    sha256: str

    @classmethod
    def of(cls, name: str, windows: Tensor) -> Corpus:
        """Wrap windows and hash them."""
        return cls(name, windows, hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest())

    @classmethod
    def mixed(cls, parts: Sequence[Corpus], seed: int = 0) -> Corpus:
        """Windows of several texts in one order, so that the first of them stand for all.

        Args:
            parts: Texts in windows of one width.
            seed: Of the order.

        Returns:
            All windows, called by the names of their texts; a single part as it is.
        """
        if len(parts) == 1:
            return parts[0]
        windows = torch.cat([part.windows for part in parts])
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        return cls.of(" and ".join(part.name for part in parts), windows[order])

    @property
    def tokens(self) -> int:
        """Number of tokens in all windows."""
        return self.windows.numel()

    def split(self, *tokens: int, seed: int = 0) -> tuple[Corpus, ...]:
        """Cut disjoint parts: each a stretch of the text of its own, its windows in an order that the seed decides.

        Neighbouring windows are of one article. Parts drawn from everywhere would share their articles, and what was
        fitted to one part would look better on the other than it is.

        Args:
            *tokens: Size of each part; rounded down to whole windows, at least one.
            seed: Of the order within the parts, so that the first windows of a part stand for all of it.

        Returns:
            One corpus per part.

        Raises:
            DataError: There are too few windows.
        """
        width = self.windows.shape[1]
        counts = [max(1, n // width) for n in tokens]
        if sum(counts) > len(self.windows):
            raise too_little_text(self.name, self.tokens, sum(counts) * width)
        generator = torch.Generator().manual_seed(seed)
        starts = [sum(counts[:i]) for i in range(len(counts))]
        orders = [torch.randperm(n, generator=generator) + s for s, n in zip(starts, counts, strict=True)]
        return tuple(Corpus.of(self.name, self.windows[order]) for order in orders)

    def record(self) -> dict[str, object]:
        """What `selfpruner.json` says about it."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "window": self.windows.shape[1],
            "sha256": self.sha256,
        }


def too_little_text(name: str, found: int, needed: int) -> DataError:
    """The error for a text that does not fill the windows asked for."""
    return DataError(
        f"The text {name!r} has only {found} tokens in whole windows; {needed} are needed.",
        "Give a longer text, or ask for fewer tokens or a shorter window.",
    )


def sources_of(data: Any) -> list[Any]:
    """The sources of a text: words with `+` between them are several, unless a file is called so.

    Args:
        data: As `AutoPruner.prune` takes it.

    Returns:
        Sources as `load_corpus` takes them, each once.
    """
    return list(dict.fromkeys(data.split("+"))) if isinstance(data, str) and not _exists(data) else [data]


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long: a text itself, say
        return False


def load_corpus(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    window: int,
    spare: int = 0,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Draw windows of `window` tokens without overlap, in the order of the text.

    Spare windows come last, from a stretch of the text behind all others, or written by another seed. Those before them
    are the same with and without them, unless a text is too short for both.

    Args:
        source: `"self"` (plain text that `model` writes), `"chat"` (conversations that it writes through the chat
            template), or what `text_sources.entries` takes.
        tokenizer: The model's tokenizer; not needed for `"self"`.
        tokens: Tokens wanted; rounded up to whole windows. A text with at least half of them gives what it has.
        window: Tokens per window, at least 2.
        spare: Further tokens, as many of them as there are.
        seed: Random seed: which windows of a long text are drawn, or what the model writes.
        model: The dense model, for `"self"` and `"chat"`.
        progress: Called with the number of windows or turns that are written.

    Returns:
        The drawn windows.

    Raises:
        DataError: The source is unknown, unreadable or too short.
    """
    count, more, name = max(1, -(-tokens // window)), -(-spare // window), name_of(source)
    generated = source if isinstance(source, str) and source in GENERATED else None
    if generated and model is None:
        raise DataError(f'data="{name}" needs the model that writes the text.')
    if generated == "self" and model is not None:
        write = partial(sample_windows, model, window=window, progress=progress)
    elif tokenizer is None:
        raise DataError(f"The text {name!r} needs a tokenizer, and the model came without one.", 'Use data="self".')
    elif generated == "chat" and model is not None:
        write = partial(_written_conversations, model, tokenizer, window=window, distinct=Distinct(), progress=progress)
    else:
        return Corpus.of(name, _drawn(source, tokenizer, window, count, more, seed))
    windows = [write(count=count, seed=seed)]
    with suppress(DataError):  # of a model that only repeats itself by now
        windows += [write(count=more, seed=seed + SPARE_SEED)] if more else []
    return Corpus.of(name, torch.cat(windows))


def _drawn(source: Any, tokenizer: PreTrainedTokenizerBase, window: int, count: int, more: int, seed: int) -> Tensor:
    """Draw `count` windows of a text, and take up to `more` behind those that were drawn from."""
    # Read up to four times what is asked for, so that the seed has windows to choose from.
    windows, found = _windows(entries(source), tokenizer, window, 4 * count + more)
    if 2 * len(windows) < count:
        raise too_little_text(name_of(source), found, count * window)
    first = min(4 * count, max(count, len(windows) - more), len(windows))
    chosen = torch.randperm(first, generator=torch.Generator().manual_seed(seed))[:count]
    return torch.cat([windows[chosen.sort().values], windows[first : first + more]])


def _written_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    window: int,
    seed: int,
    distinct: Distinct,
    progress: Progress | None,
) -> Tensor:
    """Let the model write conversations until they fill `count` windows; none is like one of `distinct`."""
    if not has_chat_template(tokenizer):
        raise DataError('data="chat" needs a tokenizer with a chat template.', 'Use data="self", or plain text.')
    windows = torch.empty(0, window, dtype=torch.int64)
    written: list[Conversation] = []
    for attempt in range(ATTEMPTS):
        length = windows.numel() / len(written) if len(windows) else min(CONVERSATION_TOKENS, window)
        some = 1 + round(1.1 * (count - len(windows)) * window / length)
        seeded = ATTEMPTS * seed + attempt
        written += write_conversations(model, tokenizer, some, seeded, distinct=distinct, progress=progress)
        windows = packed(written, window)
        if len(windows) >= count:
            return windows[:count]
    raise too_little_text("chat", windows.numel(), count * window)


def _windows(items: Iterable[Entry], tokenizer: PreTrainedTokenizerBase, window: int, most: int) -> tuple[Tensor, int]:
    """At most `most` windows of plain text or of conversations, in the order of `items`, and the tokens found."""
    rest = iter(items)
    first = next(rest, "")
    talks = not isinstance(first, str)
    if talks and not has_chat_template(tokenizer):
        raise DataError("Conversations need a tokenizer with a chat template.", "Give plain text instead.")

    def same(kind: type[T]) -> Iterator[T]:
        for each in chain([first], rest):
            if not isinstance(each, kind):
                raise DataError("Texts and conversations are mixed in one source.", "Give two files.")
            yield each

    if talks:
        windows = packed((conversation(tokenizer, messages) for messages in same(list)), window, most)
        return windows, windows.numel()
    ids = encode(same(str), tokenizer, limit=most * window)
    return torch.tensor(ids[: len(ids) // window * window], dtype=torch.int64).view(-1, window), len(ids)


def consecutive_windows(
    source: str, tokenizer: PreTrainedTokenizerBase | None, window: int, count: int | None = None
) -> Corpus:
    """Cut a text for measurement into consecutive windows without overlap; a last partial window is left out.

    Args:
        source: As for `load_corpus`, but not `"self"`; sources on the Hub give their test (or validation) split.
        tokenizer: The model's tokenizer.
        window: Tokens per window, at least 2.
        count: Only the first so many windows; None takes all.

    Returns:
        Windows in the order of the text.

    Raises:
        DataError: The text is unreadable, or shorter than a window (or than `count` windows).
    """
    if source in GENERATED:
        raise DataError(
            f"A measurement needs a text that the model did not write; got {source!r}.",
            f"Use {', '.join(HUB_SOURCES)}, or a path to a .txt or .jsonl file.",
        )
    if tokenizer is None:
        raise DataError(f"The text {source!r} needs a tokenizer, and the model came without one.")
    if window < 2 or (count is not None and count < 1):
        raise DataError(f"A measurement needs windows of at least 2 tokens, and at least one; got {window}, {count}.")
    windows, found = _windows(entries(source, "test"), tokenizer, window, count or (1 << 40) // window)
    if len(windows) < (count or 1):
        raise too_little_text(source, found, (count or 1) * window)
    return Corpus.of(f"{source} test split" if source in HUB_SOURCES else Path(source).name, windows)
