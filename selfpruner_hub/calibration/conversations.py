"""Generate conversations with a chat model, and pack conversations into windows of tokens.

An instruction-tuned model that is given the start of a user's turn completes that turn, and then answers it (Magpie,
arXiv 2406.08464). Such text resembles what a chat model reads and writes in use, and it needs no data.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import (
    Message,
    closing_ids,
    decoded,
    encoded,
    prompt_ids,
    user_turn,
)
from selfpruner_hub.calibration.generated_text import TextModel, continuations
from selfpruner_hub.errors import DataError
from selfpruner_hub.progress import Progress


@dataclass(frozen=True)
class Conversation:
    """A conversation that a model wrote.

    Attributes:
        ids: Token ids, as the chat template has them.
        answered: One flag per token: whether the assistant wrote it. Its end-of-turn token counts too.
    """

    ids: tuple[int, ...]
    answered: tuple[bool, ...]


@dataclass(frozen=True)
class Style:
    """Style of the conversations that a model writes."""

    systems: tuple[str | None, ...]
    """System prompts of the conversations, used in rotation; None uses the template's default."""
    openings: tuple[str, ...]
    """First words of the user's turns, used in rotation; "" lets the model start."""
    user_tokens: int
    """Maximum length of a user's turn; longer ones are dropped."""
    answer_tokens: int
    """Maximum length of an answer; longer ones are cut."""
    user_temperature: float
    """Sampling temperature of the user's turns."""
    answer_temperature: float
    """Sampling temperature of the answers; 0 takes the likeliest tokens."""


CHAT = Style(
    systems=(
        None,
        None,
        "You answer questions in one or two short sentences.",
        "You are a patient teacher. Children ask you simple questions.",
    ),
    openings=(
        *("", "What is", "Who", "Where", "Write a Python function", "Which", "How many"),
        *("What", "How", "", "Why", "When", "Name", "Write code in"),
    ),
    user_tokens=64,
    answer_tokens=96,
    user_temperature=1.0,
    answer_temperature=0.3,
)
"""Plain questions, code, and turns that the model starts."""
QUESTION_ATTEMPTS = 8
"""Maximum number of attempts to get enough user's turns."""
SIMILAR = 0.5
"""Jaccard similarity of word trigrams at or above which two user's turns are near-duplicates."""


def write_conversations(
    model: TextModel,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    seed: int,
    *,
    style: Style = CHAT,
    distinct: Distinct | None = None,
    progress: Progress | None = None,
) -> list[Conversation]:
    """Generate both turns of `count` conversations with a chat model; keep one of several near-duplicate user's turns.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer, with a chat template.
        count: Number of conversations, at least 1.
        seed: Random seed.
        style: Kind of the conversations.
        distinct: User's turns written before; the new turns are added to it.
        progress: Callback that receives the number of turns that are written.

    Returns:
        At most `count` conversations; fewer only if the model keeps repeating itself.

    Raises:
        DataError: The template has no user's turn, or the model writes no new user's turn that ends.
    """
    frames = [(system, user_turn(tokenizer, system)) for system in style.systems]
    usable = [(system, frame) for system, frame in frames if frame is not None]
    if not usable:
        raise DataError("The tokenizer's chat template has no user's turn that a model can write.", _OTHER_TEXT)
    ends = end_tokens(model, tokenizer)
    opened = [
        TurnStart(
            prompt=[*frame.before, *words],
            stops=ends | {frame.stop},
            read=lambda ids, words=words: decoded(tokenizer, [*words, *ids[:-1]]),  # type: ignore[misc]
            system=system,
        )
        for words in (encoded(tokenizer, opening) for opening in style.openings)
        for system, frame in usable
    ]
    distinct = distinct or Distinct()
    turns = write_turns(model, style, lambda number: islice(cycle(opened), number), count, seed, distinct, progress)
    if not turns:
        raise DataError("The model wrote no user's turn that ends, or none that is new.", _OTHER_TEXT)
    return answered(model, tokenizer, style, turns, seed, progress)


class TurnStart(NamedTuple):
    """The beginning of a user's turn, which a model goes on with."""

    prompt: list[int]
    """Token ids that the model continues."""
    stops: set[int]
    """Token ids that end the turn."""
    read: Callable[[list[int]], str]
    """Function that returns the turn, from the token ids that were written; empty if it says nothing."""
    system: str | None = None
    """System prompt of the conversation; None uses the template's default."""


def write_turns(
    model: TextModel,
    style: Style,
    opened: Callable[[int], Iterable[TurnStart]],
    count: int,
    seed: int,
    distinct: Distinct,
    progress: Progress | None = None,
) -> list[list[Message]]:
    """Let a model write user's turns until there are enough that end and are new.

    Args:
        model: The dense model.
        style: Length and temperature of the turns.
        opened: Function that returns as many beginnings as it is asked for, for each attempt anew.
        count: Number of turns, at least 1.
        seed: Random seed.
        distinct: User's turns written before; the new turns are added to it.
        progress: Callback that receives the number of turns that are written.

    Returns:
        The messages before each answer: at most `count`, and fewer only if the model keeps repeating itself.
    """
    turns: list[list[Message]] = []
    for attempt in range(QUESTION_ATTEMPTS):
        if len(turns) >= count:
            break
        batch = list(opened(8 + int(1.3 * (count - len(turns)))))
        written = continuations(
            model,
            [each.prompt for each in batch],
            style.user_tokens,
            ends=set().union(*(each.stops for each in batch)),
            temperature=style.user_temperature,
            seed=QUESTION_ATTEMPTS * seed + attempt,
            progress=progress,
            what="writing questions",
        )
        for each, ids in zip(batch, written, strict=True):
            text = each.read(ids)
            if ids[-1] in each.stops and text and distinct.add(text):
                turns.append([*([_message("system", each.system)] if each.system else []), _message("user", text)])
    return turns[:count]


def answered(
    model: TextModel,
    tokenizer: PreTrainedTokenizerBase,
    style: Style,
    turns: Sequence[Sequence[Message]],
    seed: int,
    progress: Progress | None = None,
) -> list[Conversation]:
    """Let a chat model answer.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer, with a chat template.
        style: Length and temperature of the answers.
        turns: Messages before each answer; at least one.
        seed: Random seed.
        progress: Callback that receives the number of answers that are written.

    Returns:
        Conversations in the order of `turns`, without those whose answer is empty.
    """
    prompts = [prompt_ids(tokenizer, messages) for messages in turns]
    answers = continuations(
        model,
        prompts,
        style.answer_tokens,
        ends=end_tokens(model, tokenizer),
        temperature=style.answer_temperature,
        seed=seed,
        progress=progress,
        what="writing answers",
    )
    closing = closing_ids(tokenizer)
    return [
        _answered(prompt, answer, closing)
        for prompt, answer in zip(prompts, answers, strict=True)
        if decoded(tokenizer, answer)
    ]


def _answered(prompt: list[int], answer: list[int], closing: list[int]) -> Conversation:
    """Build a conversation from prompt and answer; a finished answer gets the template's closing tokens."""
    rest = closing[1:] if answer[-1:] == closing[:1] else []
    answered = (False,) * len(prompt) + (True,) * len(answer) + (False,) * len(rest)
    return Conversation((*prompt, *answer, *rest), answered)


def end_tokens(model: TextModel, tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Token ids that end a turn, from the model's configurations and its tokenizer."""
    ends: set[int] = set()
    configs = (model.config, getattr(model, "generation_config", None), tokenizer)
    for ids in (getattr(config, "eos_token_id", None) for config in configs):
        ends.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    return ends


class Distinct:
    """A set of texts without near-duplicates, by the Jaccard similarity of their word trigrams.

    Args:
        texts: Texts of the set, in the order in which they were added.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self.texts: list[str] = []
        self._sizes: list[int] = []
        self._having: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
        for text in texts:
            self.add(text)

    def add(self, text: str) -> bool:
        """Add a text unless a similar one was added before; return whether it was added."""
        words = text.lower().split()
        grams = {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
        shared = Counter(number for gram in grams for number in self._having[gram])
        if any(n / (len(grams) + self._sizes[number] - n) >= SIMILAR for number, n in shared.items()):
            return False
        for gram in grams:
            self._having[gram].append(len(self._sizes))
        self._sizes.append(len(grams))
        self.texts.append(text)
        return True


def packed(conversations: Iterable[Sequence[int]], window: int, most: int | None = None) -> Tensor:
    """Pack conversations into windows, in order; each window begins with a new conversation.

    The last conversation of a window is cut at the end of the window.

    Args:
        conversations: Token ids of each conversation, in order.
        window: Tokens per window, at least 2.
        most: Maximum number of windows; None uses all conversations.

    Returns:
        Token ids, `[N, W]`; a partial last window is left out.
    """
    windows: list[list[int]] = []
    filling: list[int] = []
    for each in conversations:
        if len(windows) == most:
            break
        filling += each[: window - len(filling)]
        if len(filling) == window:
            windows.append(filling)
            filling = []
    return torch.tensor(windows, dtype=torch.int64).view(-1, window)


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


_OTHER_TEXT = "Use data=PATH with conversations (.jsonl with messages), or plain text such as data='wikitext2'."
