"""Figures of a model for its record and card, each with the protocol that is needed to reproduce it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import mean

import torch
from transformers import PreTrainedModel

from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.errors import UserError
from selfpruner_hub.evaluation.chat import SEED, ChatFigures, ChatMeasure
from selfpruner_hub.evaluation.metrics import TOP_K, Teacher, label_loss, mean_losses, teacher_loss
from selfpruner_hub.evaluation.questions import REPLY_TOKENS
from selfpruner_hub.evaluation.tasks import TaskScore
from selfpruner_hub.storage.model_record import Metric

ANSWERED, KEPT = "plain questions answered", "plain questions kept"
AGREEMENT, DIVERGENCE = "agreement (conversations)", "KL (conversations)"
DEFAULT_WINDOW = 2048
"""Tokens per window, where the model was made to read as many."""
CHAT_FIGURES = (ANSWERED, KEPT, AGREEMENT, DIVERGENCE)
"""Names of the figures of a chat model, the easiest to understand first."""
_KL = f"KL from the dense model over its {TOP_K} likeliest tokens and the rest as one"


def window_of(model: PreTrainedModel, window: int | None) -> int:
    """Choose the tokens per window of a measurement.

    Args:
        model: A causal language model.
        window: Tokens that were asked for; None takes `DEFAULT_WINDOW`, or as many as the model was made to read.

    Returns:
        Tokens per window.

    Raises:
        UserError: The model was made to read fewer; a perplexity there would say nothing of it.
    """
    context = getattr(model.config, "max_position_embeddings", None) or DEFAULT_WINDOW
    if window is None:
        return min(DEFAULT_WINDOW, context)
    if window > context:
        raise UserError(
            f"A window has at most {context} tokens, as many as the model was made to read; got {window}.",
            "Measure with shorter windows.",
        )
    return window


def text_figures(model: PreTrainedModel, corpus: Corpus, teacher: Teacher | None = None) -> dict[str, Metric]:
    """Measure the perplexity on a text, and the divergence from the dense model.

    Args:
        model: A causal language model.
        corpus: The text in consecutive windows.
        teacher: Result of `teach` for the dense model on these windows and their counted predictions; None leaves the
            divergence out.

    Returns:
        Figures by name; each name ends with the width of the windows in tokens.

    Raises:
        UserError: The perplexity is not finite.
    """
    count, window = corpus.windows.shape
    losses = [label_loss(corpus.windows, corpus.counted)] + ([] if teacher is None else [teacher_loss(teacher)])
    nats, *divergences = mean_losses(model, corpus.windows, *losses, counted=corpus.counted)
    protocol = (
        f"{count} consecutive windows of {window} tokens, no overlap, "
        f"{'each begun as the tokenizer begins a text, ' if corpus.start else ''}{_dtype(model)}; sha256 of the text "
        f"{corpus.sha256[:12]}"
    )
    figures = {f"perplexity ({window})": _metric(_finite(nats), protocol, corpus.name)}
    for divergence in divergences:
        figures[f"KL ({window})"] = _metric(round(divergence, 4), f"{_KL}; {protocol}", corpus.name)
    return figures


def conversation_figures(model: PreTrainedModel, measure: ChatMeasure) -> dict[str, Metric]:
    """Measure agreement with the dense model, and divergence from it, on the dense model's answers.

    Args:
        model: The dense model itself, or a pruned model with the same tokenizer.
        measure: Measurement against the dense model.

    Returns:
        Figures by name.
    """
    chat: ChatFigures = measure(model)
    protocol = (
        f"the {measure.tokens} tokens that the dense model answers in {measure.conversations} conversations: user's "
        f"turns that it samples by selfpruner-hub {version('selfpruner-hub')} with seed {SEED}, answers of its "
        f"likeliest tokens; {_dtype(model)}"
    )
    first_choice = "share of the tokens that are the model's first choice too, given all before them"
    where = "conversations of the dense model"
    return {
        AGREEMENT: _metric(round(chat.agreement, 4), f"{first_choice}; {protocol}", where),
        DIVERGENCE: _metric(round(chat.kl, 4), f"{_KL}; {protocol}", where),
    }


def question_figures(
    model: PreTrainedModel, right: Sequence[bool], half: str, dense: Sequence[bool] | None = None
) -> dict[str, Metric]:
    """Share of plain questions answered rightly, and the same among those that the dense model answers rightly.

    Args:
        model: The model that answered; its dtype is named in the protocol.
        right: One flag per question: whether the model's answer is right.
        half: Half of the questions that was asked.
        dense: The same flags for the dense model; None leaves out the second figure.

    Returns:
        Figures by name.
    """
    conditions = (
        f"half {half!r} of the questions of selfpruner-hub {version('selfpruner-hub')}, through the chat template, "
        f"likeliest tokens, at most {REPLY_TOKENS}; right where an answer is in the reply; {_dtype(model)}"
    )
    kept = [ours for ours, theirs in zip(right, dense, strict=True) if theirs] if dense is not None else []
    figures = {}
    for name, those, which in ((ANSWERED, right, ""), (KEPT, kept, " that the dense model answers rightly")):
        if those:
            share = mean(those)
            error = math.sqrt(share * (1 - share) / len(those))
            protocol = f"{len(those)} questions{which}, ± {error:.4f}; {conditions}"
            figures[name] = _metric(round(share, 4), protocol, "plain questions")
    return figures


def task_figures(model: PreTrainedModel, scores: Sequence[TaskScore], limited: bool) -> dict[str, Metric]:
    """Turn the scores of tasks into figures.

    Args:
        model: The model that was scored; its dtype is named in the protocol.
        scores: Result of `evaluate_tasks`.
        limited: Whether only the first items of each task were used.

    Returns:
        Figures by name.
    """
    return {
        f"{figure} ({score.task})": _metric(
            round(value, 4),
            f"zero-shot, {'first ' if limited else ''}{score.items} items, ± {score.errors[figure]:.4f}, "
            f"{'through the chat template, ' if score.chat else ''}{_dtype(model)}, "
            f"lm-evaluation-harness {score.version}",
            score.source,
        )
        for score in scores
        for figure, value in score.figures.items()
    }


def _metric(value: float, protocol: str, dataset: str) -> Metric:
    today = datetime.now(UTC).date().isoformat()
    return Metric(value=value, dense=None, protocol=protocol, dataset=dataset, date=today)


def _dtype(model: PreTrainedModel) -> str:
    return str(model.dtype).removeprefix("torch.")


def _finite(nats: float) -> float:
    """The perplexity to three decimals; raises `UserError` if it is not finite, because JSON has no infinity."""
    perplexity = float(torch.tensor(nats, dtype=torch.float64).exp())
    if not math.isfinite(perplexity):
        raise UserError("The model's perplexity on this text is not a number.", "Its weights may be damaged.")
    return round(perplexity, 3)
