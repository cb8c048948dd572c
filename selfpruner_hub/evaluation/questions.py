"""Plain questions with known answers, asked to a chat model through its template."""

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
"""Halves of the questions: settings are chosen on the first, figures are reported on the second."""
REPLY_TOKENS = 40
"""Maximum length of a reply in tokens."""


@dataclass(frozen=True)
class PlainQuestion:
    """A question in English that a child can answer."""

    half: str
    """One of `HALVES`."""
    topic: str
    question: str
    answers: tuple[str, ...]
    """Accepted forms of the answer; a right reply contains at least one."""

    def is_right(self, reply: str) -> bool:
        """Whether a reply contains one of the answers as whole words, in upper or lower case."""
        return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", reply, re.IGNORECASE) for answer in self.answers)


def load_questions(half: str = "report") -> list[PlainQuestion]:
    """Read the questions that come with the package, 200 in each half.

    Args:
        half: One of `HALVES`.

    Returns:
        Questions in the order of the file.

    Raises:
        UserError: There is no such half.
    """
    if half not in HALVES:
        raise UserError(f"Unknown half {half!r} of the questions.", f"Choose one of: {', '.join(HALVES)}.")
    text = (resources.files(__package__) / "questions.jsonl").read_text(encoding="utf-8")
    all_of_them = [json.loads(line) for line in text.splitlines()]
    return [PlainQuestion(**{**q, "answers": tuple(q["answers"])}) for q in all_of_them if q["half"] == half]


def replies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    progress: Progress | None = None,
) -> list[str]:
    """Ask a chat model questions, with its template's default system prompt; it answers with its likeliest tokens.

    A model that can think before it answers is asked not to: its thoughts would take all tokens of a reply.

    Args:
        model: A chat model.
        tokenizer: Its tokenizer, with a chat template.
        questions: Questions, each the text of one user's turn.
        progress: Callback that receives the number of replies that are done.

    Returns:
        Replies of at most `REPLY_TOKENS` tokens, in the order of the questions.

    Raises:
        DataError: The template rejects a user's turn.
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
    questions: Sequence[PlainQuestion],
    progress: Progress | None = None,
) -> list[bool]:
    """One flag per question: whether the model answers it rightly; arguments and errors are those of `replies`."""
    answers = replies(model, tokenizer, [each.question for each in questions], progress)
    return [question.is_right(reply) for question, reply in zip(questions, answers, strict=True)]
