"""Plain questions with known answers: whether a chat model, asked through its template, still says what it knew."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import decoded, prompt_ids
from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.errors import UserError
from selfpruner_hub.progress import Progress

HALVES = ("develop", "report")
"""Settings are chosen on the first; figures are of the second."""
REPLY_TOKENS = 40
"""Largest length of a reply."""


@dataclass(frozen=True)
class Question:
    """A question in English that a child can answer."""

    half: str
    """One of `HALVES`."""
    topic: str
    question: str
    answers: tuple[str, ...]
    """Forms of the answer; one of them is enough."""

    def is_right(self, reply: str) -> bool:
        """Whether one of the answers is in a reply, as whole words, in upper or lower case."""
        return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) for answer in self.answers)


def load_questions(half: str = "report") -> list[Question]:
    """Read the questions that the package brings, 200 in each half.

    Args:
        half: One of `HALVES`.

    Returns:
        Questions in their order.

    Raises:
        UserError: There is no such half.
    """
    if half not in HALVES:
        raise UserError(f"Unknown half {half!r} of the questions.", f"Choose one of: {', '.join(HALVES)}.")
    text = (resources.files(__package__) / "questions.jsonl").read_text(encoding="utf-8")
    all_of_them = [json.loads(line) for line in text.splitlines()]
    return [Question(**{**q, "answers": tuple(q["answers"])}) for q in all_of_them if q["half"] == half]


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    progress: Progress | None = None,
) -> list[str]:
    """Ask a chat model, with no system prompt but its template's; the likeliest token each time.

    Args:
        model: A chat model.
        tokenizer: Its tokenizer, with a chat template.
        questions: Texts of a user's turn.
        progress: Called with the number of replies that are done.

    Returns:
        Replies of at most `REPLY_TOKENS` tokens.

    Raises:
        DataError: The template does not take a user's turn.
    """
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": question}]) for question in questions]
    written = continuations(
        model,
        prompts,
        REPLY_TOKENS,
        ends=end_tokens(model, tokenizer),
        temperature=0,
        progress=progress,
        what="answering questions",
    )
    return [decoded(tokenizer, ids) for ids in written]


def rightly_answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> list[bool]:
    """Whether a model answers each question rightly; arguments and errors as for `replies`."""
    said = replies(model, tokenizer, [each.question for each in questions], progress)
    return [question.is_right(reply) for question, reply in zip(questions, said, strict=True)]
