"""Recovery: distil a pruned model from its dense parent, and keep the result only if it is better."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub import ranks
from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.served_model import ServedModel
from selfpruner_hub.calibration.text_sources import tokenizer_hash
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.placement import streams
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.pruning.temperature import MATCHING_TOKENS, match_confidence
from selfpruner_hub.ranks import from_first, is_first, spread
from selfpruner_hub.recovery.deciding import Deciding, PlainQuestions, answers_fewer, is_better, score
from selfpruner_hub.recovery.distiller import Distiller, Pace, Windows, arguments, last_checkpoint, step_seconds
from selfpruner_hub.recovery.process import check_processes, undisturbed, writable
from selfpruner_hub.recovery.schedule import Schedule, Timed, keep, kept, planned, scheduled
from selfpruner_hub.recovery.settings import RecoveryBudget, RecoverySettings
from selfpruner_hub.recovery.texts import Share, Text, Writer, shares
from selfpruner_hub.recovery.trainable import compute_dtype, finished, trainable, uses_adapters, whole
from selfpruner_hub.storage.run import Run

POINTS = 100
"""Points of the loss curve in the record."""


class Pair(NamedTuple):
    """A pruned model and its parent."""

    pruned: PreTrainedModel
    """The pruned model; it is left as it is."""
    parent: PreTrainedModel
    """Its dense parent, on the same device."""
    tokenizer: PreTrainedTokenizerBase | None
    """Tokenizer of both."""
    served: ServedModel | None = None
    """The parent behind a server that writes the text; None lets it write here."""


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
    started = time.monotonic()
    _check_pair(pair.pruned, pair.parent)
    task = _Task.of(pair, budget, data, settings, run)
    writer = Writer(pair.served or pair.parent, pair.tokenizer, task.window, task.run)
    deciding, writing = from_first(writer.deciding)
    questions = PlainQuestions(pair.parent, pair.tokenizer, run.progress)
    asking = time.monotonic()
    answered = questions(pair.pruned)
    started -= time.monotonic() - asking  # the recovered model will be asked too
    with undisturbed(pair.pruned.device):
        torch.manual_seed(run.seed)  # adapters begin at random
        student = trainable(pair.pruned, settings, task.adapters)
        known = from_first(lambda: kept(task.run.checkpoints))
        schedule = known or task.scheduled(student, deciding, writing, started)
        texts = from_first(lambda: task.texts(writer, schedule, deciding))
        measure = Deciding(pair.parent, texts.deciding)
        before = measure(pair.pruned)

        def check(model: PreTrainedModel) -> float:
            return score(before, measure(cast(PreTrainedModel, whole(model, pair.pruned))))

        distiller = task.distiller(student, check, schedule, texts, folder)
        pace = Pace(schedule.seconds, run.progress)
        _train(distiller, pace)
        model = finished(student, pair.pruned)
    if is_first():
        match_confidence(pair.parent, model, texts.first(max(1, MATCHING_TOKENS // task.window)), run.progress)
    spread(model.parameters())
    after, still_answered = measure(model), questions(model)
    answers = {"asked": len(answered), "before": sum(answered), "after": sum(still_answered)}
    record = {
        **task.record(distiller, pace.stopped),
        "texts": [text.record(count) for text, count in zip(texts.training, schedule.counts, strict=True)],
        "deciding": [
            {"name": text.name, "tokens": int(text.counted.sum()), "before": round(was, 5), "after": round(now, 5)}
            for text, was, now in zip(texts.deciding, before, after, strict=True)
        ],
        "answers": answers if answered else None,
        "curve": curve(distiller.divergences, task.batch * task.window),
    }
    better = is_better(before, after, len(deciding)) and not answers_fewer(answered, still_answered)
    return Recovered(model if better else None, record)


class _Texts(NamedTuple):
    """Texts of a recovery."""

    training: list[Text]
    """Texts to train on."""
    deciding: list[Text]
    """Texts that nothing is trained on, and that decide."""
    order: list[tuple[int, int]]
    """Pairs of the number of a training text and the number of a window in it, as they are read."""

    @property
    def hashes(self) -> str:
        """Hashes of all texts."""
        return "".join(text.sha256 for text in (*self.training, *self.deciding))

    def first(self, count: int) -> Tensor:
        """The windows that are read first, `[count, W]`."""
        return torch.stack([self.training[number].windows[place] for number, place in self.order[:count]])


@dataclass(frozen=True)
class _Task:
    """One recovery: its models, budget and settings, and the sizes that follow from them."""

    pair: Pair
    budget: RecoveryBudget
    settings: RecoverySettings
    kinds: list[Share]
    """Kinds of text with their shares."""
    window: int
    """Tokens of a window."""
    batch: int
    """Windows of a step, of all processes."""
    adapters: bool
    """Whether adapters are trained in place of all weights."""
    dtype: torch.dtype
    """Dtype of the products."""
    identity: str
    """Everything that the result depends on, except the content of the texts, as JSON."""
    run: Run
    """Run context, with the checkpoints of this task alone."""

    @classmethod
    def of(cls, pair: Pair, budget: RecoveryBudget, data: Any, settings: RecoverySettings, run: Run) -> _Task:
        """The task of the arguments of `recover`."""
        window = min(settings.window, getattr(pair.parent.config, "max_position_embeddings", settings.window))
        kinds = shares(data, pair.tokenizer, settings)
        identity = json.dumps(
            [
                *(identity_of(model) for model in (pair.pruned, pair.parent)),
                *(tokenizer_hash(pair.tokenizer), sorted(end_tokens(pair.parent, pair.tokenizer))),
                *(asdict(budget), settings.record(), run.seed, [(kind.name, kind.share) for kind in kinds]),
            ]
        )
        batch = max(1, settings.batch_tokens // window)
        adapters = from_first(lambda: uses_adapters(pair.pruned, settings))
        check_processes(pair.pruned.device, identity, batch, window, adapters)
        return cls(
            pair=pair,
            budget=budget,
            settings=settings,
            kinds=kinds,
            window=window,
            batch=batch,
            adapters=adapters,
            dtype=compute_dtype(pair.pruned),
            identity=identity,
            run=replace(run, checkpoints=run.checkpoints.of(identity)),
        )

    @property
    def part(self) -> int:
        """Windows of a step that this process reads."""
        return self.batch // ranks.count()

    def scheduled(
        self, student: nn.Module, deciding: Sequence[Text], writing: Mapping[str, float], started: float
    ) -> Schedule:
        """Choose how much is written and read, and keep it for a resumed recovery."""
        timed = self.budget.minutes is not None
        step = step_seconds(student, self.pair.parent, deciding, self.part, self.dtype) if timed else 0.0
        spent = Timed(writing, step, time.monotonic() - started)

        def plan() -> Schedule:
            schedule = planned(self.budget, self.kinds, self.batch, self.window, self.settings, spent)
            keep(self.run.checkpoints, schedule)
            return schedule

        return from_first(plan)

    def texts(self, writer: Writer, schedule: Schedule, deciding: Sequence[Text]) -> _Texts:
        """Write and read all texts, and split off what decides beside `deciding`."""
        amounts = zip(self.kinds, schedule.counts, strict=True)
        pairs = [writer.training(kind, count, self.settings.passes) for kind, count in amounts]
        training = [text for text, _ in pairs]
        held = [text for _, text in pairs if text is not None]
        return _Texts(training, [*deciding, *held], scheduled(training, schedule.counts, self.run.seed))

    def distiller(
        self,
        student: nn.Module,
        check: Callable[[PreTrainedModel], float],
        schedule: Schedule,
        texts: _Texts,
        folder: Path,
    ) -> Distiller:
        """Make the training loop, with its checkpoints in a folder of its own inside of `folder`.

        What is read is read anew, and may have changed: the training goes on where all texts are the same. Checkpoints
        of divided weights are of another form.
        """
        form = "fsdp" if ranks.sharded() else ""
        name = f"training-{sha256((self.identity + texts.hashes + form).encode()).hexdigest()[:16]}"
        made = arguments(
            folder / name,
            self.pair.pruned.device,
            schedule.steps,
            schedule.checks(self.part, sum(len(text.windows) for text in texts.deciding), self.settings),
            self.part,
            self.settings,
            learning_rate=self.settings.rate(self.pair.pruned.num_parameters(), self.adapters),
            bf16=self.dtype == torch.bfloat16,
            seed=self.run.seed,
        )
        return Distiller(
            student,
            self.pair.parent,
            check,
            self.dtype,
            args=made,
            train_dataset=Windows(texts.training, texts.order),
            eval_dataset=Windows(texts.deciding, []),  # Trainer asks for one; `check` measures
        )

    def record(self, distiller: Distiller, stopped: str) -> dict[str, Any]:
        """Fields of the record about the training."""
        return {
            "method": "lora" if self.adapters else "full",
            "learning_rate": distiller.args.learning_rate,
            "steps": distiller.state.global_step,
            "tokens": distiller.state.global_step * self.batch * self.window,
            "stopped": stopped,
            "settings": self.settings.record(),
        }


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
