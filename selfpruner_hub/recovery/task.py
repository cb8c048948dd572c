"""One recovery: its models and budget, and the sizes, texts and training that follow from them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub import ranks
from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.served_model import ServedModel
from selfpruner_hub.calibration.text_sources import tokenizer_hash
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.ranks import from_first
from selfpruner_hub.recovery.distiller import Distiller, Windows, arguments
from selfpruner_hub.recovery.process import check_processes
from selfpruner_hub.recovery.schedule import (
    FINAL,
    PLANNED,
    Schedule,
    Timed,
    keep,
    kept,
    planned,
    scheduled,
    step_seconds,
)
from selfpruner_hub.recovery.settings import RecoveryBudget, RecoverySettings
from selfpruner_hub.recovery.texts import Share, Text, Writer, shares
from selfpruner_hub.recovery.trainable import compute_dtype, uses_adapters
from selfpruner_hub.storage.checkpoints import Checkpoints, Clock
from selfpruner_hub.storage.run import Run

METHOD = "recovery-method"
"""Name of the checkpoint of the choice between adapters and all weights."""


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


class RecoveryTexts(NamedTuple):
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

    def read(self, count: int) -> list[int]:
        """Windows of each training text among those that are read first."""
        numbers = Counter(number for number, _ in self.order[:count])
        return [numbers[number] for number in range(len(self.training))]

    def first(self, count: int) -> Tensor:
        """The windows that are read first, `[count, W]`."""
        return torch.stack([self.training[number].windows[place] for number, place in self.order[:count]])


@dataclass(frozen=True)
class Task:
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
    clock: Clock
    """Time that this task takes."""

    @classmethod
    def of(cls, pair: Pair, budget: RecoveryBudget, data: Any, settings: RecoverySettings, run: Run) -> Task:
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
        checkpoints = run.checkpoints.of(identity)
        adapters = from_first(lambda: _adapters(pair.pruned, settings, checkpoints))
        check_processes(pair.pruned.device, identity, batch, window, adapters)
        checkpoints.save(METHOD, {"adapters": torch.tensor(adapters)})
        clock = Clock(checkpoints)
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
            run=replace(run, checkpoints=checkpoints.timed_by(clock)),
            clock=clock,
        )

    @property
    def part(self) -> int:
        """Windows of a step that this process reads."""
        return self.batch // ranks.count()

    def scheduled(self, student: nn.Module, deciding: Sequence[Text], writing: Mapping[str, float]) -> Schedule:
        """Choose how much is written and read, or take what was chosen before."""
        checkpoints = self.run.checkpoints
        if (known := from_first(lambda: kept(checkpoints, PLANNED))) is not None:
            return known
        timed = self.budget.minutes is not None
        step = step_seconds(student, self.pair.parent, deciding, self.part, self.dtype) if timed else 0.0
        spent = Timed(writing, step, self.clock.spent)
        sizes = self.kinds, self.batch, self.window, self.settings
        return from_first(lambda: keep(checkpoints, PLANNED, planned(self.budget, *sizes, spent)))

    def texts(self, writer: Writer, schedule: Schedule, deciding: Sequence[Text]) -> tuple[RecoveryTexts, Schedule]:
        """Write and read all texts, split off what decides beside `deciding`, and fit the schedule to the time left."""
        amounts = zip(self.kinds, schedule.counts, strict=True)
        pairs = [writer.training(kind, count, self.settings.passes) for kind, count in amounts]
        training = [text for text, _ in pairs]
        held = [text for _, text in pairs if text is not None]
        schedule = self._final(schedule)
        order = scheduled(training, schedule.counts, self.run.seed)
        return RecoveryTexts(training, [*deciding, *held], order), schedule

    def _final(self, schedule: Schedule) -> Schedule:
        """Fit the steps into the time that is left, since writing may have taken less than was expected, or more."""
        if self.budget.minutes is None:
            return schedule
        if (known := kept(self.run.checkpoints, FINAL)) is not None:
            return known
        return keep(self.run.checkpoints, FINAL, schedule.within(60 * self.budget.minutes - self.clock.spent))

    def distiller(
        self,
        student: nn.Module,
        check: Callable[[PreTrainedModel], float],
        schedule: Schedule,
        texts: RecoveryTexts,
        folder: Path,
    ) -> Distiller:
        """Make the training loop, with its checkpoints in a folder of its own inside of `folder`.

        What is read is read anew, and may have changed: the training goes on where all texts are the same. Checkpoints
        of divided weights, and of adapters, are of another form.
        """
        form = "lora" if self.adapters else "fsdp" if ranks.sharded() else ""
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


def _adapters(model: PreTrainedModel, settings: RecoverySettings, checkpoints: Checkpoints) -> bool:
    """Whether adapters are trained: a resumed recovery goes on as it began, whatever memory is free now."""
    tensors = checkpoints.load(METHOD)
    return bool(tensors["adapters"]) if tensors else uses_adapters(model, settings)
