"""Text for calibration, search and measurement, as seeded windows of tokens with a record of where they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.calibration.text_sources import HUB_SOURCES, encode, file_texts, hub_texts
from selfpruner_hub.errors import DataError
from selfpruner_hub.progress import Progress


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


def load_corpus(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    tokens: int,
    window: int,
    seed: int = 0,
    model: PreTrainedModel | None = None,
    split: str = "train",
    progress: Progress | None = None,
) -> Corpus:
    """Draw windows of `window` tokens without overlap, in the order of the text.

    Args:
        source: `"wikitext2"` or `"c4"` (from the Hub), `"self"` (sampled by `model`), or a path to `.txt` (one text)
            or `.jsonl` (a text per line under the key `text`).
        tokenizer: The model's tokenizer; not needed for `"self"`.
        tokens: Tokens wanted; rounded up to whole windows. A text file with at least half of them gives what it has.
        window: Tokens per window, at least 2.
        seed: Decides which windows of a long text are drawn, or what the model samples.
        model: The dense model, for `"self"`.
        split: `"train"` or `"test"`, for sources on the Hub.
        progress: Told how many windows have been sampled or tokens read.

    Returns:
        The drawn windows.

    Raises:
        DataError: The source is unknown, unreadable or too short.
    """
    count = max(1, -(-tokens // window))
    if source == "self":
        if model is None:
            raise DataError('data="self" needs the model that samples the text.')
        return Corpus.of("self", sample_windows(model, count, window, seed, progress))
    if tokenizer is None:
        raise DataError(f"The text {source!r} needs a tokenizer, and the model came without one.", 'Use data="self".')
    texts = hub_texts(source, split) if source in HUB_SOURCES else file_texts(Path(source))
    # Read up to four times what is asked for, so that the seed has windows to choose from.
    ids = encode(texts, tokenizer, limit=4 * count * window)
    found = len(ids) // window
    if 2 * found < count:
        raise too_little_text(source, len(ids), count * window)
    windows = torch.tensor(ids[: found * window], dtype=torch.int64).view(found, window)
    chosen = torch.randperm(found, generator=torch.Generator().manual_seed(seed))[:count]
    name = source if source in HUB_SOURCES else Path(source).name
    return Corpus.of(name, windows[chosen.sort().values])


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
    if source == "self":
        raise DataError(
            "A measurement needs a text that the model did not write; got 'self'.",
            f"Use {', '.join(HUB_SOURCES)}, or a path to a .txt or .jsonl file.",
        )
    if tokenizer is None:
        raise DataError(f"The text {source!r} needs a tokenizer, and the model came without one.")
    if window < 2 or (count is not None and count < 1):
        raise DataError(f"A measurement needs windows of at least 2 tokens, and at least one; got {window}, {count}.")
    texts = hub_texts(source, "test") if source in HUB_SOURCES else file_texts(Path(source))
    ids = encode(texts, tokenizer, limit=1 << 40 if count is None else count * window)
    found = len(ids) // window
    if found < (count or 1):
        raise too_little_text(source, len(ids), (count or 1) * window)
    name = f"{source} test split" if source in HUB_SOURCES else Path(source).name
    return Corpus.of(name, torch.tensor(ids[: found * window], dtype=torch.int64).view(found, window))
