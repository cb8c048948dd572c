"""What decides whether a recovery is kept: divergence on text that nothing is trained on, and answers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.evaluation.metrics import mean_losses, teach, teacher_loss
from selfpruner_hub.evaluation.questions import load_questions, rightly_answered
from selfpruner_hub.progress import Progress
from selfpruner_hub.ranks import from_first, is_first
from selfpruner_hub.recovery.texts import Text

NOISE = 1.03
"""Divergence on a text that is read, as a multiple of that before recovery, up to which it counts as no worse: a few
windows of it tell no more, and what the parent writes says whether the model is worse in general."""
ERRORS = 2
"""Standard errors of the number of answers by which a model may have fewer of them."""


class Deciding:
    """Measures a model against its parent on each deciding text. Of several processes, the first one does, for all.

    Args:
        parent: The dense parent.
        texts: Deciding texts; nothing else reads them.
    """

    def __init__(self, parent: PreTrainedModel, texts: Sequence[Text]) -> None:
        self._texts = texts
        mine = texts if is_first() else ()
        self._losses = [teacher_loss(teach(parent, text.windows, counted=text.counted)) for text in mine]

    def __call__(self, model: PreTrainedModel) -> list[float]:
        """KL divergence from the parent on each text, in nats per counted token."""
        return from_first(
            lambda: [
                mean_losses(model, text.windows, loss, counted=text.counted)[0]
                for text, loss in zip(self._texts, self._losses, strict=True)
            ]
        )


class PlainQuestions:
    """Asks the plain questions that the parent answers. Of several processes, the first one does, for all.

    Args:
        parent: The dense parent.
        tokenizer: Its tokenizer; without a chat template, nothing is asked.
        progress: Callback that receives the number of replies that are done.
    """

    def __init__(
        self, parent: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, progress: Progress | None
    ) -> None:
        self._tokenizer, self._progress = tokenizer, progress
        self._questions = load_questions("develop") if has_chat_template(tokenizer) else []
        self._questions = [each for each, right in zip(self._questions, self(parent), strict=True) if right]

    def __call__(self, model: PreTrainedModel) -> list[bool]:
        """One flag per question: whether a model answers it rightly."""
        if self._tokenizer is None or not self._questions:
            return []
        asked = self._tokenizer, self._questions, self._progress
        return from_first(lambda: rightly_answered(model, *asked))


def answers_fewer(before: Sequence[bool], after: Sequence[bool]) -> bool:
    """Whether a model answers fewer questions, by more than the error of the difference (McNemar's test).

    A divergence is a mean over all tokens. It can fall while facts, which hang on one or two tokens each, are lost.

    Args:
        before: One flag per question before recovery.
        after: One flag per question after it.

    Returns:
        Whether it does.
    """
    changed = [was - now for was, now in zip(before, after, strict=True)]
    lost, won = changed.count(1), changed.count(-1)
    return lost - won > ERRORS * math.sqrt(lost + won)


def score(before: Sequence[float], after: Sequence[float]) -> float:
    """Mean of the divergences as shares of those before; infinite where one is not finite."""
    ratios = [now / max(then, 1e-9) for then, now in zip(before, after, strict=True)]
    return sum(ratios) / len(ratios) if all(map(math.isfinite, ratios)) else math.inf


def is_better(before: Sequence[float], after: Sequence[float], written: int) -> bool:
    """Whether a model is nearer to its parent on average, and on none of the texts farther from it.

    Args:
        before: Divergence on each deciding text before recovery; first those that the parent wrote.
        after: Divergence after it.
        written: Number of texts that the parent wrote.

    Returns:
        Whether it is. On a text that was read, up to `NOISE` times the divergence before is no farther.
    """
    allowed = [then * (1 if number < written else NOISE) for number, then in enumerate(before)]
    return score(before, after) < 1 and all(now <= most for most, now in zip(allowed, after, strict=True))


def grade(before: Sequence[float], after: Sequence[float], written: int) -> float:
    """Score of a state in training, with 1 more where it would be refused: one that would be kept comes first.

    Args:
        before: Divergence on each deciding text before recovery; first those that the parent wrote.
        after: Divergence after it.
        written: Number of texts that the parent wrote.

    Returns:
        The lower, the better.
    """
    return score(before, after) + (not is_better(before, after, written))
