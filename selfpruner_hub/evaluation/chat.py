"""Divergence and agreement between a pruned chat model and its dense model, on the answers of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.conversations import CHAT, Conversation, write_conversations
from selfpruner_hub.errors import DataError
from selfpruner_hub.evaluation.metrics import Teacher, mean_losses, miss_loss, teach, teacher_loss
from selfpruner_hub.progress import Progress

CONVERSATIONS = 64
"""Number of conversations in a measurement."""
SEED = 1_000_003
"""Random seed of the conversations; it differs from that of the calibration text unless a user sets the same."""


@dataclass(frozen=True)
class ChatFigures:
    """Figures over the assistant's tokens; the answers are the dense model's likeliest tokens."""

    kl: float
    """Mean KL divergence from the dense model, in nats per token."""
    agreement: float
    """Share of these tokens that are also the model's likeliest token, given all tokens before; in [0, 1]."""


class ChatMeasure:
    """Measures models against one dense model on conversations that the dense model wrote.

    Args:
        dense: The dense model; it answers with its likeliest tokens.
        tokenizer: Its tokenizer, with a chat template.
        count: Number of conversations.
        seed: Random seed of the user's turns.
        progress: Callback that receives the number of turns that are written.

    Raises:
        DataError: `write_conversations` fails, or all answers are empty.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int = CONVERSATIONS,
        seed: int = SEED,
        progress: Progress | None = None,
    ) -> None:
        style = replace(CHAT, answer_temperature=0.0)
        written = write_conversations(dense, tokenizer, count, seed, style=style, progress=progress)
        if not written:
            raise DataError("The dense model's answers are empty.", "Leave conversations out with --no-chat.")
        self.conversations = len(written)
        self._windows, self._counted = padded(written)
        self._teacher: Teacher = teach(dense, self._windows, counted=self._counted)

    @property
    def tokens(self) -> int:
        """Number of the assistant's tokens."""
        return int(self._counted.sum())

    def __call__(self, model: PreTrainedModel) -> ChatFigures:
        """Measure a model that uses the tokenizer of the dense model."""
        losses = teacher_loss(self._teacher), miss_loss(self._windows, self._counted)
        kl, missed = mean_losses(model, self._windows, *losses, counted=self._counted)
        return ChatFigures(kl, 1 - missed)


def padded(conversations: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
    """Pad conversations to rows of one width; the padding is on the right and does not count.

    Args:
        conversations: Conversations, at least one.

    Returns:
        Token ids, `[N, W]`, and a mask of the predictions of the assistant's tokens, `[N, W - 1]`, bool.
    """
    width = max(len(each.ids) for each in conversations)
    ids = torch.zeros(len(conversations), width, dtype=torch.int64)
    counted = torch.zeros(len(conversations), width, dtype=torch.bool)
    for row, each in enumerate(conversations):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        counted[row, : len(each.ids)] = torch.tensor(each.answered)
    return ids, counted[:, 1:]
