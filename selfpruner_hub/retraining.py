"""Changes of a pruned model after the cut: conversion, distillation from its parent, training by a user."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.served_model import served_by
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.models.unsupported import check_is_model
from selfpruner_hub.models.weights import changed, identity_of, rebuild_buffers, sampled
from selfpruner_hub.progress import Bars, Progress, silent
from selfpruner_hub.provenance import changed_in_place, check_parent, trained
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.settings import check_seed
from selfpruner_hub.storage.checkpoints import CHECKPOINTS, Checkpoints
from selfpruner_hub.storage.model_record import Record
from selfpruner_hub.storage.offload import MEMORY
from selfpruner_hub.storage.run import Run
from selfpruner_hub.storage.run_lock import run_lock
from selfpruner_hub.storage.staging import output_path

logger = logging.getLogger(__name__)


class Conversion:
    """Conversions of a pruned model to a device or a dtype, in place.

    Rotary frequencies stay those of the configuration, which the conversions of transformers round: a converted model
    is the one that is saved and loaded in that dtype. Conversions of `model` itself are made good when it is measured,
    saved or exported.
    """

    model: PreTrainedModel
    report: Record
    _sampled: dict[str, Tensor]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model to a device or a dtype, in place; arguments are those of `torch.nn.Module.to`."""
        self._notice_training()
        self.model.to(*args, **kwargs)
        rebuild_buffers(self.model)
        self._sampled = sampled(self.model)
        return self

    def half(self) -> Self:
        """Convert the model to float16, in place."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """Convert the model to bfloat16, in place."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """Convert the model to float32, in place."""
        return self.to(torch.float32)

    def double(self) -> Self:
        """Convert the model to float64, in place."""
        return self.to(torch.float64)

    def cpu(self) -> Self:
        """Move the model to the CPU, in place."""
        return self.to("cpu")

    def cuda(self, device: int | str | None = None) -> Self:
        """Move the model to an NVIDIA GPU, in place; None is the current one."""
        return self.to(f"cuda:{device}" if isinstance(device, int) else device or "cuda")

    def _notice_training(self) -> None:
        """Put it into the record if the weights were changed in place: figures of the old ones are no longer true."""
        before, self._sampled = self._sampled, sampled(self.model)
        if changed(before, self._sampled):
            self.report = changed_in_place(self.report)


class Retraining(Conversion):
    """Methods of `PrunedModel` for weights that are trained after the cut."""

    tokenizer: PreTrainedTokenizerBase | None
    report: Record
    _checkpoints: Checkpoints

    def retrained(self, model: PreTrainedModel, how: str) -> Self:
        """Return this model with weights that were trained after pruning, without the figures of the old weights.

        Args:
            model: Trained model, with the widths of this one and its adapters merged.
            how: Method and data of the training, in one line for the record and the card.

        Returns:
            The model with its new record, to be measured and saved.

        Raises:
            UserError: The model has other widths, adapters or values that are not finite, or `how` is not one line.
        """
        check_is_model(model, "The trained model")
        return self._with(model.eval(), trained(self.report, model, how), Checkpoints())

    def recover(
        self,
        dense: PreTrainedModel,
        *,
        minutes: float | None = None,
        tokens: int | None = None,
        data: Any = None,
        writer: str | None = None,
        writer_model: str | None = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        progress: bool | Progress = True,
        **changes: Any,
    ) -> Self:
        """Distil the model from its dense parent, mostly on text that the parent writes.

        The training minimises the KL divergence from the parent over the whole vocabulary. Text that nothing is trained
        on decides which state is kept, and that text and plain questions whether any is. Ctrl-C ends the training early
        with the best state so far. The processes of a launcher (`ranks`) call this together, with the same arguments
        and models.

        Args:
            dense: The dense parent, on the device of this model.
            minutes: Minutes in all; the text that is written and the number of steps are chosen so that they fit.
            tokens: Tokens to train on, repeats included, in place of minutes.
            data: Text, as for `AutoPruner.prune`; None takes what the parent writes and `"wikitext2"`. `"chat"` stands
                for conversations and short questions that the parent writes and answers.
            writer: URL of a server of the parent that writes the text, as for `AutoPruner.prune`.
            writer_model: Name of the parent at that server; None takes the only one there.
            seed: Random seed.
            run_dir: Directory of texts and checkpoints; the same call with the same directory resumes. None keeps
                nothing.
            progress: Whether to show bars on stderr, or a function that is called with (what, done, total).
            **changes: Values of fields of `recovery.settings.RecoverySettings`.

        Returns:
            The recovered model with its record, without the figures of the old weights; this model where the deciding
            text says that recovery does not improve it.

        Raises:
            UserError: An argument is wrong, the text is too short, or `dense` is not the parent.
            OutputError: The directory cannot be written.
            EndpointError: The server of `writer` does not answer.
        """
        from selfpruner_hub import ranks
        from selfpruner_hub.recovery.recover import recover  # Trainer takes a second to import
        from selfpruner_hub.recovery.task import Pair

        settings, budget = resolve_recovery(**changes), RecoveryBudget(minutes, tokens)
        check_seed(seed)
        folder = None if run_dir is None else output_path(run_dir)
        self._check_dense(dense)
        self._notice_training()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ranks.joined(self.model.device))
            callback = progress if callable(progress) else stack.enter_context(Bars(progress))
            callback = callback if ranks.is_first() else silent
            stack.enter_context(working_on(self.model, dense))
            ranks.from_first(lambda: stack.enter_context(run_lock(folder)))
            scratch = tempfile.TemporaryDirectory
            stages = (folder or Path(ranks.from_first(lambda: stack.enter_context(scratch())))) / CHECKPOINTS
            run = Run(MEMORY, Checkpoints(stages / "recovery"), callback, seed)
            pair = Pair(self.model, dense, self.tokenizer, served_by(writer, writer_model, dense, self.tokenizer))
            result = recover(pair, budget, data, settings, run, stages / "recovery")
        if result.model is None:
            if ranks.is_first():
                logger.warning("%s The model is left as it was.", result.line)
                run.checkpoints.clear()
            return self
        record = {**result.record, "seed": seed}
        how = f"distilled from its parent on {record['tokens']:,} tokens in {record['minutes']} minutes"
        recovered = replace(trained(self.report, result.model, how), recovery=record)
        return self._with(result.model, recovered, Checkpoints(stages))

    def _check_dense(self, dense: PreTrainedModel) -> None:
        """Refuse what is not the dense parent."""
        check_is_model(dense, "dense")
        check_parent(self.report, identity_of(dense), "dense")

    def _with(self, model: PreTrainedModel, report: Record, checkpoints: Checkpoints) -> Self:
        retrained = copy.copy(self)
        retrained.model, retrained.report, retrained._checkpoints, retrained._sampled = (
            model,
            report,
            checkpoints,
            sampled(model),
        )
        return retrained
