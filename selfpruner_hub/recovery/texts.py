"""The texts of recovery: what the parent writes and what is read, to train on and to decide by."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.calibration.conversations import Conversation, Distinct, write_conversations
from selfpruner_hub.calibration.corpus import CONVERSATION_ATTEMPTS, load_corpus, too_little_text
from selfpruner_hub.calibration.generated_text import TextModel
from selfpruner_hub.calibration.text_sources import GENERATED, name_of, sources_of
from selfpruner_hub.errors import DataError
from selfpruner_hub.recovery.questions import write_questions
from selfpruner_hub.recovery.settings import RecoverySettings
from selfpruner_hub.storage.run import Run

DECIDING_WINDOWS = 10
"""Windows of each kind of text that decide which state is kept."""
SPREAD = 8
"""The windows that decide are taken from so many times as many: neighbours are of one article, unlike others."""
CALIBRATED = 2**19
"""Tokens at the start of a text that is read, from which the cut may have drawn its calibration text; a model looks
better on these."""
TRAINING_SEED, DECIDING_SEED = 2**29, 2**30
"""Offsets of the random seeds of what is trained on, and of what the parent writes to decide by: the cut has others."""
DECIDING_PART = 8
"""A text that is too short for all that is wanted of it gives one of so many windows to decide by."""
LENGTHS = {"conversations": 110, "questions": 60}
"""Expected tokens of a conversation of each kind, until the first ones are written."""
SEPARATOR = "\0"
"""Stands between user's turns in a checkpoint."""
CHATS = {"conversations": write_conversations, "questions": write_questions}
"""What writes the conversations of each kind."""


class Text(NamedTuple):
    """Windows of one kind."""

    name: str
    """`conversations` or `questions` (that a chat model writes), `self`, or the name of a source that is read."""
    windows: Tensor
    """Token ids, `[N, W]`."""
    counted: Tensor
    """Mask of the predictions that count, `[N, W - 1]`, bool: the assistant's tokens of conversations, else all."""

    def part(self, places: slice) -> Text:
        """The windows at some places."""
        return Text(self.name, self.windows[places], self.counted[places])

    @property
    def sha256(self) -> str:
        """Hash of the token ids, as hexadecimal digits."""
        return sha256(self.windows.contiguous().numpy().tobytes()).hexdigest()

    def record(self, windows: int) -> dict[str, Any]:
        """The entry for `selfpruner.json`, with the number of windows of this kind that were read."""
        return {
            "name": self.name,
            "tokens": self.windows.numel(),
            "tokens_read": windows * self.windows.shape[1],
            "sha256": self.sha256,
        }


class Share(NamedTuple):
    """One kind of text, and its share of the windows."""

    name: str
    """Name, as of a `Text`."""
    source: Any
    """Source, as for `load_corpus`."""
    share: float
    """Share of the windows, in (0, 1]."""

    @property
    def is_written(self) -> bool:
        """Whether the parent writes it."""
        return isinstance(self.source, str) and self.source in GENERATED


def shares(data: Any, tokenizer: PreTrainedTokenizerBase | None, settings: RecoverySettings) -> list[Share]:
    """Split a text argument into kinds of text and their shares.

    Args:
        data: Text argument, as for `AutoPruner.prune`; None takes what the parent writes and `"wikitext2"`. `"chat"`
            stands for conversations and short questions.
        tokenizer: Tokenizer of the model.
        settings: Settings of recovery.

    Returns:
        The kinds of text; their shares sum to 1.
    """
    chats = has_chat_template(tokenizer)
    sources = sources_of(("chat" if chats else "self") + "+wikitext2" if data is None else data)
    written = [source for source in sources if isinstance(source, str) and source in GENERATED]
    read = [source for source in sources if source not in written]
    of_written = settings.written_share if read else 1.0
    pairs = []
    for source in written:
        share = of_written / len(written)
        if source == "chat":
            pairs.append(Share("conversations", source, share * (1 - settings.question_share)))
            pairs.append(Share("questions", source, share * settings.question_share))
        else:
            pairs.append(Share(name_of(source), source, share))
    left = 1.0 if not written else 1 - of_written
    pairs += [Share(name_of(source), source, left / len(read)) for source in read]
    return [each for each in pairs if each.share > 0]


class Writer:
    """Writes or reads the texts of a recovery, each from its checkpoint where there is one.

    Args:
        model: The parent.
        tokenizer: Its tokenizer; None allows only `"self"`.
        window: Tokens of a window.
        run: Run context.
    """

    def __init__(self, model: TextModel, tokenizer: PreTrainedTokenizerBase | None, window: int, run: Run) -> None:
        self._model, self._tokenizer, self._window, self._run = model, tokenizer, window, run
        self._distinct = Distinct()
        self._seconds: dict[str, float] = {}

    def deciding(self) -> tuple[list[Text], dict[str, float]]:
        """Write the deciding texts, whatever is trained on: conversations and questions, or else plain text.

        Returns:
            The texts, and the seconds that writing a window of each took.
        """
        write = partial(self._written, count=DECIDING_WINDOWS, seed=self._run.seed + DECIDING_SEED)
        texts = []
        for name in CHATS if has_chat_template(self._tokenizer) else ():
            with suppress(DataError):  # a template does not make a model that converses
                texts.append(write(name))
        return texts or [write("self")], dict(self._seconds)

    def training(self, kind: Share, count: int, passes: int) -> tuple[Text, Text | None]:
        """Write or read one text to train on.

        Args:
            kind: Kind of text.
            count: Number of windows to train on, with repeats.
            passes: Times that what is written is read.

        Returns:
            The text to train on, and, of a text that is read, a part of its end to decide by.

        Raises:
            DataError: The source is unknown, unreadable or too short.
        """
        seed = self._run.seed + TRAINING_SEED
        if kind.is_written:
            return self._written(kind.name, -(-count // passes), seed), None
        windows = self._loaded(kind.source, count, seed, SPREAD * DECIDING_WINDOWS)
        text = Text(kind.name, windows, _all(windows))
        held = min(SPREAD * DECIDING_WINDOWS, max(len(windows) - count, len(windows) // DECIDING_PART))
        if not held:
            raise too_little_text(kind.name, windows.numel(), DECIDING_PART * self._window, "or a shorter window")
        return text.part(slice(None, -held)), text.part(slice(-held, None, max(1, held // DECIDING_WINDOWS)))

    def _written(self, name: str, count: int, seed: int) -> Text:
        """Windows of one kind that the parent writes, `count` or fewer, from the checkpoint where there is one."""
        key = f"recovery-written-{name}-{count}-{seed}"
        if tensors := self._run.checkpoints.load(key):
            self._distinct = Distinct(_lines(tensors["turns"]))  # so that what follows is the same
            self._seconds[name] = float(tensors["seconds"])
            return Text(name, tensors["windows"], tensors["counted"].bool())
        started = time.monotonic()
        if name in CHATS:
            windows, counted = self._conversations(name, count, seed)
        else:
            windows = self._loaded(name, count, seed)
            counted = _all(windows)
        turns = torch.tensor([*SEPARATOR.join(self._distinct.texts).encode()], dtype=torch.uint8)
        self._seconds[name] = (time.monotonic() - started) / len(windows)
        seconds = torch.tensor(self._seconds[name])
        tensors = {"windows": windows, "counted": counted.to(torch.uint8), "turns": turns, "seconds": seconds}
        self._run.checkpoints.save(key, tensors)
        return Text(name, windows, counted)

    def _loaded(self, source: Any, count: int, seed: int, spare: int = 0) -> Tensor:
        """Windows of a source, `count + spare` or fewer; no other has seen the spare ones, if the text is so long."""
        return load_corpus(
            source,
            self._tokenizer,
            tokens=count * self._window,
            spare=spare * self._window,
            behind=CALIBRATED if spare else 0,
            least=0.0,
            window=self._window,
            seed=seed,
            model=self._model,
            progress=self._run.progress,
        ).windows

    def _conversations(self, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """Write conversations until they fill `count` windows; fewer if the model repeats itself."""
        if self._tokenizer is None or not has_chat_template(self._tokenizer):
            raise DataError('data="chat" needs a tokenizer with a chat template.', 'Use data="self", or plain text.')
        write = partial(CHATS[name], distinct=self._distinct, progress=self._run.progress)
        rows: list[tuple[list[int], list[bool]]] = []
        written: list[Conversation] = []
        for attempt in range(CONVERSATION_ATTEMPTS):
            length = len(rows) * self._window / len(written) if rows else LENGTHS[name]
            some = 2 + round(1.1 * (count - len(rows)) * self._window / min(length, self._window))
            try:
                written += write(self._model, self._tokenizer, some, CONVERSATION_ATTEMPTS * seed + attempt)
            except DataError:
                if not rows:
                    raise
                break  # by now the model only repeats itself
            rows = list(_packed(written, self._window))
            if len(rows) >= count:
                break
        if not rows and any(len(each.ids) >= self._window for each in written):
            raise DataError(
                f"The prompts of {name} fill a window of {self._window} tokens before an answer begins.",
                "Set a longer window.",
            )
        if not rows:
            raise too_little_text(name, sum(len(each.ids) for each in written), self._window, "or shorter windows")
        ids, answered = zip(*rows[:count], strict=True)
        return torch.tensor(ids), torch.tensor(answered)[:, 1:]


def _lines(turns: Tensor) -> list[str]:
    """The user's turns that a checkpoint holds."""
    text = bytes(turns.tolist()).decode()
    return text.split(SEPARATOR) if text else []


def _all(windows: Tensor) -> Tensor:
    """The mask of windows whose predictions all count."""
    return torch.ones(windows.shape[0], windows.shape[1] - 1, dtype=torch.bool)


def _packed(conversations: Sequence[Conversation], window: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Fill windows with conversations, in order; the last one of a window is cut at its end."""
    ids: list[int] = []
    answered: list[bool] = []
    for each in conversations:
        ids += each.ids[: window - len(ids)]
        answered += each.answered[: window - len(answered)]
        if len(ids) == window:
            if any(answered[1:]):  # a prompt may be longer than the window
                yield ids, answered
            ids, answered = [], []
