"""Recovery: distil a pruned model from its dense parent, and keep the result only if it is better."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.placement import streams
from selfpruner_hub.pruning.temperature import MATCHING_TOKENS, match_confidence
from selfpruner_hub.ranks import from_first, is_first, spread
from selfpruner_hub.recovery.deciding import Deciding, PlainQuestions, answers_fewer, grade, is_better
from selfpruner_hub.recovery.distiller import Distiller, Pace, last_checkpoint
from selfpruner_hub.recovery.process import undisturbed, writable
from selfpruner_hub.recovery.settings import RecoveryBudget, RecoverySettings
from selfpruner_hub.recovery.task import Pair, Task
from selfpruner_hub.recovery.texts import Writer
from selfpruner_hub.recovery.trainable import finished, trainable, whole
from selfpruner_hub.storage.run import Run

POINTS = 100
"""Points of the loss curve in the record."""


class Recovered(NamedTuple):
    """Result of a recovery."""

    model: PreTrainedModel | None
    """The recovered model; None where the deciding text or the answers say that it is not better."""
    record: dict[str, Any]
    """Entry of the model's record."""

    @property
    def line(self) -> str:
        """Result of the recovery, in one line."""
        divergences = ", ".join(
            f"{text['before']:.3f} -> {text['after']:.3f} on {text['name']}" for text in self.record["deciding"]
        )
        if answers := self.record["answers"]:
            divergences += f"; answers {answers['before']} -> {answers['after']} of {answers['asked']}"
        stopped = f" (stopped: {self.record['stopped']})" if self.record["stopped"] else ""
        verdict = "brought the model nearer to its parent" if self.model is not None else "did not improve the model"
        return f"Recovery on {self.record['tokens']} tokens{stopped} {verdict}: KL {divergences}."


def recover(
    pair: Pair, budget: RecoveryBudget, data: Any, settings: RecoverySettings, run: Run, folder: Path
) -> Recovered:
    """Distil a pruned model from its parent.

    Args:
        pair: The models.
        budget: Minutes or tokens.
        data: Text argument, as for `AutoPruner.prune`.
        settings: Settings of recovery.
        run: Run context; its checkpoints keep the texts and the schedule.
        folder: Directory of the checkpoints of the training, from which a killed recovery resumes.

    Returns:
        The recovered model, or None in its place, and what was measured.

    Raises:
        UserError: The text is unreadable or too short, the budget too small, or the models do not fit together.
        OutputError: A checkpoint cannot be written.
    """
    _check_pair(pair.pruned, pair.parent)
    task = Task.of(pair, budget, data, settings, run)
    writer = Writer(pair.served or pair.parent, pair.tokenizer, task.window, task.run)
    deciding, writing = from_first(writer.deciding)
    questions = PlainQuestions(pair.parent, pair.tokenizer, run.progress)
    asking = time.monotonic()
    answered = questions(pair.pruned)
    task.clock.reserve(time.monotonic() - asking)  # the recovered model will be asked too
    with undisturbed(pair.pruned.device):
        torch.manual_seed(run.seed)  # adapters begin at random
        student = trainable(pair.pruned, settings, task.adapters)
        first = task.scheduled(student, deciding, writing)
        texts, schedule = from_first(lambda: task.texts(writer, first, deciding))
        measure = Deciding(pair.parent, texts.deciding)
        before = measure(pair.pruned)

        def check(model: PreTrainedModel) -> float:
            return grade(before, measure(cast(PreTrainedModel, whole(model, pair.pruned))), len(deciding))

        distiller = task.distiller(student, check, schedule, texts, folder)
        pace = Pace(schedule.seconds, run.progress, task.clock)
        _train(distiller, pace)
        model = finished(student, pair.pruned)
    if is_first():
        match_confidence(pair.parent, model, texts.first(max(1, MATCHING_TOKENS // task.window)), run.progress)
    spread(model.parameters())
    after, still_answered = measure(model), questions(model)
    answers = {"asked": len(answered), "before": sum(answered), "after": sum(still_answered)}
    read = distiller.state.global_step * task.batch
    record = {
        **task.record(distiller, pace.stopped),
        "minutes": round(task.clock.elapsed / 60, 1),
        "texts": [text.record(count) for text, count in zip(texts.training, texts.read(read), strict=True)],
        "deciding": [
            {"name": text.name, "tokens": int(text.counted.sum()), "before": round(was, 5), "after": round(now, 5)}
            for text, was, now in zip(texts.deciding, before, after, strict=True)
        ],
        "answers": answers if answered else None,
        "curve": curve(distiller.divergences, task.batch * task.window),
    }
    better = is_better(before, after, len(deciding)) and not answers_fewer(answered, still_answered)
    return Recovered(model if better else None, record)


def _train(distiller: Distiller, pace: Pace) -> None:
    """Train, from the newest checkpoint on."""
    folder = Path(cast(str, distiller.args.output_dir))
    distiller.add_callback(pace)
    with writable(folder), pace.interruptible():
        distiller.train(resume_from_checkpoint=from_first(lambda: last_checkpoint(folder)))


def curve(divergences: Sequence[float], tokens: int) -> list[list[float]]:
    """Average the divergences of the steps, so that the record stays short.

    Args:
        divergences: Divergence of each step.
        tokens: Tokens of a step.

    Returns:
        At most `POINTS` pairs: tokens read so far, and the mean divergence since the pair before.
    """
    size = max(1, -(-len(divergences) // POINTS))
    parts = [divergences[first : first + size] for first in range(0, len(divergences), size)]
    return [
        [min((number + 1) * size, len(divergences)) * tokens, round(sum(part) / len(part), 5)]
        for number, part in enumerate(parts)
        if np.isfinite(part).all()
    ]


def _check_pair(pruned: PreTrainedModel, parent: PreTrainedModel) -> None:
    if streams(pruned) or streams(parent):
        raise UserError(
            "Recovery needs both models in memory, and one of them rests in files.",
            "Load the saved model and its parent without offload_folder (--offload).",
        )
    sizes = [len(model.get_output_embeddings().weight) for model in (pruned, parent)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"The pruned model has a vocabulary of {sizes[0]} tokens and the parent one of {sizes[1]}.",
            "Give the model that it was pruned from.",
        )
    if pruned.device != parent.device:
        raise UserError(
            f"The pruned model is on {pruned.device} and its parent on {parent.device}.", "Load both on one device."
        )
