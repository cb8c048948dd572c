"""Use a tokenizer's chat template: tokens of conversations and of prompts, start of a user turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from transformers import PreTrainedTokenizerBase

from selfpruner_hub.errors import DataError

Message = Mapping[str, str]
"""One turn, with its `role` (system, user or assistant) and its `content`."""
MARK = "\u2402selfpruner\u2403"
"""Placeholder for a user's turn, to find what the template writes around it; no template contains this text."""


DATE = date(2026, 1, 1)
"""Date that templates write in place of today's, so that a run has the same text on every day."""
_FIELDS = {f"%{letter}": DATE.strftime(f"%{letter}") for letter in "aAbBcdHIjmMpSUwWxXyY"}
_FIELDS |= {f"%-{letter}": str(int(_FIELDS[f"%{letter}"])) for letter in "dHIjmMSy"}
_FROZEN = (
    "{%- macro strftime_now(format) -%}{%- set said = namespace(text=format) -%}"
    f"{{%- for field, value in {_FIELDS}.items() -%}}"
    "{%- set said.text = said.text.replace(field, value) -%}{%- endfor -%}{{- said.text -}}{%- endmacro %}\n"
)
"""Beginning of a template whose `strftime_now` says `DATE`."""


def has_chat_template(tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether the tokenizer comes with a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def template_date(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """The date that the chat template is given, as in 2026-01-01; None where it asks for none."""
    return DATE.isoformat() if "strftime_now" in str(getattr(tokenizer, "chat_template", None)) else None


def conversation_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages; raises the errors of `rendered`."""
    return encoded(tokenizer, rendered(tokenizer, messages))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and of the start of the assistant's turn; raises the errors of `rendered`."""
    return encoded(tokenizer, rendered(tokenizer, messages, prompt=True))


def rendered(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], prompt: bool = False, thinking: bool = False
) -> str:
    """Render messages as text, on the day `DATE`.

    Args:
        tokenizer: Tokenizer with a chat template.
        messages: Turns in order.
        prompt: Whether to add the start of the assistant's turn.
        thinking: Whether a model that can think before it answers is asked to; other templates ignore it.

    Returns:
        Text with special tokens.

    Raises:
        DataError: The template rejects these messages.
    """
    try:
        template = _FROZEN + tokenizer.get_chat_template() if template_date(tokenizer) else None
        written = tokenizer.apply_chat_template(
            [dict(m) for m in messages],
            chat_template=template,
            add_generation_prompt=prompt,
            tokenize=False,
            enable_thinking=thinking,
        )
        return str(written)
    except Exception as error:  # a template is a program that comes with the model: it may raise anything
        raise DataError(
            f"The chat template cannot write these messages: {str(error) or type(error).__name__}.",
            'Each message needs a "role" (system, user or assistant) and a "content".',
        ) from error


@dataclass(frozen=True)
class UserTurn:
    """The tokens that the template writes around a user's turn.

    Attributes:
        before: Token ids before the turn.
        after: Token ids between the turn and the answer.
        stop: Token id that ends the turn.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    stop: int


def user_turn(tokenizer: PreTrainedTokenizerBase, system: str | None) -> UserTurn | None:
    """Find the tokens around the first turn of a user.

    Args:
        tokenizer: Tokenizer with a chat template.
        system: System prompt; None uses the template's default.

    Returns:
        Tokens around the turn; None if the template accepts no system prompt, or does not copy a user's turn unchanged.
    """
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": MARK})
    try:
        text, thinking = (rendered(tokenizer, messages, prompt=True, thinking=thinks) for thinks in (False, True))
    except DataError:
        return None
    before, mark, after = text.partition(MARK)
    if not mark or not after or (system and system not in before):
        return None
    # Against thinking, GLM-4.5 writes a word of its own after the turn, which is not what ends it.
    ending = encoded(tokenizer, thinking.partition(MARK)[2] or after)
    return UserTurn(tuple(encoded(tokenizer, before)), tuple(encoded(tokenizer, after)), ending[0])


def closing_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that the template writes after an answer; empty if it does not copy the answer unchanged."""
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": MARK}]
    return encoded(tokenizer, rendered(tokenizer, messages).partition(MARK)[2])


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Text of the token ids, without special tokens and without surrounding white space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text; special tokens in the text are recognised, and none are added."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
