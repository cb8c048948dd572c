"""Text for calibration, search and measurement: windows of tokens, chosen by a random seed, with their source."""

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
from transformers import PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import conversation_ids, has_chat_template
from selfpruner_hub.calibration.conversations import Distinct, packed, write_conversations
from selfpruner_hub.calibration.generated_text import TextModel, sample_windows
from selfpruner_hub.calibration.text_sources import GENERATED, HUB_SOURCES, Entry, encode, entries, name_of, start_ids
from selfpruner_hub.errors import DataError
from selfpruner_hub.progress import Progress

_T = TypeVar("_T")
CONVERSATION_TOKENS = 100
"""Expected length of a conversation in tokens, used until the first conversations are written."""
CONVERSATION_ATTEMPTS = 4
"""Maximum number of attempts to fill the windows with conversations that the model writes."""
C4_WINDOWS = 256
"""Number of windows of c4 in a measurement that names none; its validation split has some hundred million tokens."""
SPARE_SEED = 2**31
"""Offset of the random seed for spare text that a model writes; the random seed of a run is smaller."""


@dataclass(frozen=True)
class Corpus:
    """Windows of tokens.

    Attributes:
        name: Name of the source.
        windows: Token ids, `[N, W]`, int64.
        sha256: Hash of the token ids, as hexadecimal digits.
        start: Number of tokens at the start of every window that the tokenizer adds (`text_sources.start_ids`).
    """

    name: str
    windows: Tensor
    sha256: str
    start: int = 0

    @classmethod
    def of(cls, name: str, windows: Tensor, start: int = 0) -> Corpus:
        """Wrap windows and hash them."""
        return cls(name, windows, hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest(), start)

    @property
    def counted(self) -> Tensor | None:
        """Mask of the predictions of text, `[N, W - 1]`, bool, without those of tokens that the tokenizer adds.

        None if all count: the first token of a window is never predicted.
        """
        if self.start < 2:
            return None
        mask = torch.ones(self.windows.shape[0], self.windows.shape[1] - 1, dtype=torch.bool)
        mask[:, : self.start - 1] = False
        return mask

    @classmethod
    def mixed(cls, parts: Sequence[Corpus], seed: int = 0) -> Corpus:
        """Shuffle the windows of several texts together, so that the first windows represent all texts.

        Args:
            parts: Texts in windows of one width.
            seed: Random seed of the order.

        Returns:
            All windows, under the joined names of their texts; a single part is returned unchanged.
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
        """Cut the corpus into disjoint parts; each is one contiguous stretch of the text, its windows shuffled.

        Neighbouring windows often come from one article. Parts drawn at random from the whole text would share
        articles, and a model fitted to one part would look better on the other than on unseen text.

        Args:
            *tokens: Size of each part in tokens; rounded down to whole windows, at least one.
            seed: Random seed of the order within each part; the first windows of a part represent all of it.

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
        """The entry for `selfpruner.json`."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "window": self.windows.shape[1],
            "sha256": self.sha256,
        }


SHORTER = "a faster preset, or fewer calibration_tokens and fitness_tokens"
"""Ways to make a pruning run need less text."""


def too_little_text(name: str, tokens: int, needed: int, otherwise: str = SHORTER) -> DataError:
    """The error for a text that does not fill the requested windows."""
    return DataError(
        f"The text {name!r} has only {tokens} tokens in whole windows; {needed} are needed.",
        f"Give a longer text, {otherwise}.",
    )


def load_corpus(
    source: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    window: int,
    spare: int = 0,
    behind: int = 0,
    least: float = 0.5,
    seed: int = 0,
    model: TextModel | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Draw windows of `window` tokens without overlap, in the order of the text.

    Spare windows come last: from the text behind all other windows, or generated with another random seed. Asking for
    them does not change the windows before them, unless the text is too short for both.

    Args:
        source: `"self"` (plain text that `model` writes), `"chat"` (conversations that it writes through the chat
            template), or a source of `text_sources.entries`.
        tokenizer: The model's tokenizer; not needed for `"self"`.
        tokens: Number of tokens wanted, with those that start a window; rounded up to whole windows. A shorter text
            is used whole.
        window: Tokens per window, at least 2.
        spare: Number of further tokens wanted; fewer are returned if the text ends.
        behind: Tokens at the start of a text that is read of which the spare windows have none; if the text is too
            short for that, they are its last ones.
        least: Share of the tokens that a text that is read must have, and at least one window.
        seed: Random seed: selects the windows of a long text, or seeds the generation.
        model: The dense model, for `"self"` and `"chat"`.
        progress: Callback that receives the number of windows or turns that are written.

    Returns:
        The drawn windows.

    Raises:
        DataError: The source is unknown, unreadable or too short.
    """
    count, more, name = max(1, -(-tokens // window)), -(-spare // window), name_of(source)
    generated = source if isinstance(source, str) and source in GENERATED else None
    if generated and model is None:
        raise DataError(f'data="{name}" needs the model that writes the text.')
    _check_room(window, start_ids(tokenizer))
    if generated == "self" and model is not None:
        write = partial(sample_windows, model, window=window, progress=progress, start=start_ids(tokenizer))
    elif tokenizer is None:
        raise DataError(f"The text {name!r} needs a tokenizer, and the model came without one.", 'Use data="self".')
    elif generated == "chat" and model is not None:
        write = partial(_written_conversations, model, tokenizer, window=window, distinct=Distinct(), progress=progress)
    else:
        return Corpus.of(name, _drawn(source, tokenizer, window, (count, more, -(-behind // window)), seed, least))
    windows = [write(count=count, seed=seed)]
    with suppress(DataError):  # by now the model may only repeat itself
        windows += [write(count=more, seed=seed + SPARE_SEED)] if more else []
    return Corpus.of(name, torch.cat(windows))


def _drawn(
    source: Any,
    tokenizer: PreTrainedTokenizerBase,
    window: int,
    counts: tuple[int, int, int],
    seed: int,
    least: float,
) -> Tensor:
    """Draw `count` windows from the start of a text, and take up to `more` after these and after the first `behind`."""
    count, more, behind = counts
    # Read up to four times as many windows as requested, so that the random seed has a choice.
    windows, length = _windows(entries(source), tokenizer, window, max(4 * count, behind) + more)
    if len(windows) < max(1, least * count):
        raise too_little_text(name_of(source), length, count * window)
    first = min(4 * count, max(count, len(windows) - more), len(windows))
    chosen = torch.randperm(first, generator=torch.Generator().manual_seed(seed))[:count]
    then = max(first, min(behind, len(windows) - more))
    return torch.cat([windows[chosen.sort().values], windows[then : then + more]])


def _written_conversations(
    model: TextModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    window: int,
    seed: int,
    distinct: Distinct,
    progress: Progress | None,
) -> Tensor:
    """Generate conversations until they fill `count` windows, or at least half of them if the model writes no more.

    Near-duplicates of `distinct` are left out.
    """
    if not has_chat_template(tokenizer):
        raise DataError('data="chat" needs a tokenizer with a chat template.', 'Use data="self", or plain text.')
    windows = torch.empty(0, window, dtype=torch.int64)
    written: list[Sequence[int]] = []
    for attempt in range(CONVERSATION_ATTEMPTS):
        length = windows.numel() / len(written) if len(windows) else min(CONVERSATION_TOKENS, window)
        some = 1 + round(1.1 * (count - len(windows)) * window / length)
        seeded = CONVERSATION_ATTEMPTS * seed + attempt
        try:
            talks = write_conversations(model, tokenizer, some, seeded, distinct=distinct, progress=progress)
        except DataError:
            if 2 * len(windows) < count:
                raise
            break
        written += [talk.ids for talk in talks]
        windows = packed(written, window)
        if len(windows) >= count:
            break
    if 2 * len(windows) < count:
        raise too_little_text("chat", windows.numel(), count * window)
    return windows[:count]


def _windows(items: Iterable[Entry], tokenizer: PreTrainedTokenizerBase, window: int, most: int) -> tuple[Tensor, int]:
    """At most `most` windows of texts or of conversations, in the order of `items`, and the number of tokens found."""
    rest = iter(items)
    first = next(rest, "")
    talks = not isinstance(first, str)
    if talks and not has_chat_template(tokenizer):
        raise DataError("Conversations need a tokenizer with a chat template.", "Give plain text instead.")

    def same(kind: type[_T]) -> Iterator[_T]:
        for each in chain([first], rest):
            if not isinstance(each, kind):
                raise DataError("Texts and conversations are mixed in one source.", "Give two files.")
            yield each

    if talks:
        windows = packed((conversation_ids(tokenizer, messages) for messages in same(list)), window, most)
        return windows, windows.numel()
    start = start_ids(tokenizer)
    left = window - len(start)
    ids = encode(same(str), tokenizer, limit=most * left)
    windows = torch.tensor(ids[: len(ids) // left * left], dtype=torch.int64).view(-1, left)
    before = torch.tensor(start, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([before, windows], 1), len(ids) + before.numel()


def _check_room(window: int, start: Sequence[int]) -> None:
    if window < len(start) + 1:
        raise DataError(f"A window of {window} tokens has no room for text after the {len(start)} of its start.")


def consecutive_windows(
    source: str, tokenizer: PreTrainedTokenizerBase | None, window: int, count: int | None = None
) -> Corpus:
    """Cut a text for measurement into consecutive windows without overlap; a partial last window is left out.

    Args:
        source: Source for `load_corpus`, but not `"self"` or `"chat"`; Hub sources use their test or validation split.
        tokenizer: The model's tokenizer.
        window: Tokens per window, at least 2.
        count: Number of windows, from the start of the text; None takes all, or `C4_WINDOWS` of c4.

    Returns:
        Windows in the order of the text.

    Raises:
        DataError: The text is unreadable, or shorter than one window (or than `count` windows).
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
    if count is None and source == "c4":
        count = C4_WINDOWS
    start = start_ids(tokenizer)
    _check_room(window, start)
    windows, length = _windows(entries(source, "test"), tokenizer, window, count or (1 << 40) // window)
    if len(windows) < (count or 1):
        raise too_little_text(source, length, (count or 1) * window, "or ask for fewer or shorter windows")
    name = f"{source} test split" if source in HUB_SOURCES else Path(source).name
    begun = bool((windows[:, : len(start)] == torch.tensor(start)).all())  # a chat template may begin otherwise
    return Corpus.of(name, windows, len(start) if begun else 0)
