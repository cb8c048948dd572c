"""How near a pruned chat model stays to its parent where it answers: divergence and agreement on conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import Conversation
from selfpruner_hub.calibration.conversations import write_conversations
from selfpruner_hub.evaluation.metrics import Teacher, mean_losses, miss_loss, teach, teacher_loss
from selfpruner_hub.progress import Progress

CONVERSATIONS = 64
"""Conversations of a measurement."""
SEED = 1_000_003
"""Random seed of the conversations of a measurement; not that of a calibration, unless a user asks for it."""


@dataclass(frozen=True)
class ChatFigures:
    """Figures over the assistant's tokens of conversations whose answers are the dense model's likeliest tokens."""

    kl: float
    """Mean KL divergence from the dense model, in nats per token."""
    agreement: float
    """Share of the tokens that are the model's first choice too, given all before them; in [0, 1]."""


class ChatMeasure:
    """Measures models against one dense model on conversations that it wrote.

    Args:
        dense: The dense model, which answers by its likeliest tokens.
        tokenizer: Its tokenizer, with a chat template.
        count: Number of conversations.
        seed: Random seed of the user's turns.
        progress: Called while the conversations are written.

    Raises:
        DataError: As for `write_conversations`.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        count: int = CONVERSATIONS,
        seed: int = SEED,
        progress: Progress | None = None,
    ) -> None:
        written = write_conversations(dense, tokenizer, count, seed, temperature=0, progress=progress)
        self.conversations = len(written)
        self._windows, self._counted = padded(written)
        self._teacher: Teacher = teach(dense, self._windows, counted=self._counted)

    @property
    def tokens(self) -> int:
        """Number of the assistant's tokens."""
        return int(self._counted.sum())

    def __call__(self, model: PreTrainedModel) -> ChatFigures:
        """Measure a model with the tokenizer of the dense one."""
        losses = teacher_loss(self._teacher), miss_loss(self._windows, self._counted)
        kl, missed = mean_losses(model, self._windows, *losses, counted=self._counted)
        return ChatFigures(kl, 1 - missed)


def padded(conversations: Sequence[Conversation]) -> tuple[Tensor, Tensor]:
    """Conversations as rows of one width; what pads them comes last and counts nothing.

    Args:
        conversations: At least one.

    Returns:
        Token ids, `[N, W]`, and the predictions of the assistant's tokens, `[N, W - 1]`, bool.
    """
    width = max(len(each.ids) for each in conversations)
    ids = torch.zeros(len(conversations), width, dtype=torch.int64)
    counted = torch.zeros(len(conversations), width, dtype=torch.bool)
    for row, each in enumerate(conversations):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        counted[row, : len(each.ids)] = torch.tensor(each.answered)
    return ids, counted[:, 1:]
