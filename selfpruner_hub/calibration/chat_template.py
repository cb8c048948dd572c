"""A tokenizer's chat template: conversations as tokens, which of them the assistant wrote, how a user's turn begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from selfpruner_hub.errors import DataError

Message = Mapping[str, str]
"""A turn: its `role` (system, user or assistant) and its `content`."""
MARK = "\u2402selfpruner\u2403"
"""Text that no template contains; stands for a user's turn to find what is written around it."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as the chat template writes it.

    Attributes:
        ids: Token ids.
        answered: For each token, whether the assistant wrote it; its end-of-turn token counts.
    """

    ids: tuple[int, ...]
    answered: tuple[bool, ...]


def has_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def conversation(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Conversation:
    """Write messages by the chat template.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        messages: Turns in their order; at least one.

    Returns:
        The conversation. Where a template rewrites earlier turns, only the last answer counts as the assistant's; a
        first turn of the assistant, which answers nothing, does not count.

    Raises:
        DataError: The template refuses these messages.
    """
    text = rendered(tokenizer, messages)
    spans = []
    for index, message in enumerate(messages):
        if index and message.get("role") == "assistant":
            before = rendered(tokenizer, messages[:index], prompt=True)
            through = rendered(tokenizer, messages[: index + 1])
            if text.startswith(before) and text.startswith(through.rstrip()):
                spans.append((len(before), len(through.rstrip())))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = tokens["offset_mapping"]
    answered = tuple(any(a <= start and end <= b and end > start for a, b in spans) for start, end in offsets)
    return Conversation(tuple(tokens["input_ids"]), answered)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and of the beginning of the assistant's turn; raises as `conversation` does."""
    return encoded(tokenizer, rendered(tokenizer, messages, prompt=True))


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool = False) -> str:
    """The text of the messages.

    Args:
        tokenizer: With a chat template.
        messages: Turns in their order.
        prompt: Whether to add the beginning of the assistant's turn.

    Returns:
        Text with special tokens.

    Raises:
        DataError: The template refuses these messages.
    """
    try:
        return str(
            tokenizer.apply_chat_template([dict(m) for m in messages], add_generation_prompt=prompt, tokenize=False)
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"The chat template cannot write these messages: {error}.",
            'Each message needs a "role" (system, user or assistant) and a "content".',
        ) from error


@dataclass(frozen=True)
class UserTurn:
    """What the template writes around a user's turn.

    Attributes:
        before: Token ids of all that comes before it.
        after: Token ids of all that comes between it and the answer.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]


def user_turn(tokenizer: PreTrainedTokenizerBase, system: str | None) -> UserTurn | None:
    """Find what stands around the first turn of a user.

    Args:
        tokenizer: With a chat template.
        system: System prompt; None leaves it to the template.

    Returns:
        Tokens around the turn, or None where the template takes no system prompt, or writes no user's turn as it is.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    try:
        text = rendered(tokenizer, [*messages, {"role": "user", "content": MARK}], prompt=True)
    except DataError:
        return None
    before, found, after = text.partition(MARK)
    if not found or not after or (system and system not in before):
        return None
    return UserTurn(tuple(encoded(tokenizer, before)), tuple(encoded(tokenizer, after)))


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of what the template writes after an answer; empty where it does not write the answer as it is."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    return encoded(tokenizer, rendered(tokenizer, messages).partition(MARK)[2])


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens and space around it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, special tokens in it read as such, and none added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
