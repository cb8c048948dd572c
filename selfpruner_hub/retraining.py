"""Training after the cut: a pruned model distilled from its parent, or trained by a user."""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.weights import count_parameters
from selfpruner_hub.progress import Bars
from selfpruner_hub.recovery.settings import Budget, resolve
from selfpruner_hub.settings import check_seed
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.model_record import Record
from selfpruner_hub.storage.offload import MEMORY
from selfpruner_hub.storage.run import Run

logger = logging.getLogger(__name__)


class Retraining:
    """What `PrunedModel` can do with weights that are trained after the cut."""

    model: PreTrainedModel
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
        if not how.strip() or "\n" in how:
            raise UserError("Say in one line how the model was trained.", 'For example "LoRA of rank 16 on my-data".')
        if any(".base_layer." in name for name, _ in model.named_parameters()):
            raise UserError("The model still has adapters.", "Merge them first: model.merge_and_unload().")
        if shape_of(model.config).dense != self.report.plan:
            raise UserError(
                "The trained model has other widths than the pruned one.", "Train this model: pruned.model."
            )
        broken = [name for name, weights in model.named_parameters() if not weights.isfinite().all()]
        if broken:
            raise UserError(f"The training diverged: {broken[0]} is not finite.", "Train with a lower learning rate.")
        report = replace(self.report, metrics={}, method={**self.report.method, "training": how.strip()})
        return self._with(model.eval(), report, Checkpoints())

    def recover(
        self,
        dense: PreTrainedModel,
        *,
        minutes: float | None = None,
        tokens: int | None = None,
        data: Any = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        progress: bool | Callable[..., None] = True,
        **settings: Any,
    ) -> Self:
        """Distil the model from its dense parent, mostly on text that the parent writes; never worse than before.

        The training minimises the KL divergence from the parent over the whole vocabulary. Text that nothing is trained
        on decides which state is kept, and whether any is. Ctrl-C ends the training early with the best state so far.

        Args:
            dense: The dense parent, on the device of this model.
            minutes: Minutes in all; the text that is written and the number of steps are chosen so that they fit.
            tokens: Tokens to train on, repeats included, in place of minutes.
            data: Text, as for `AutoPruner.prune`; None takes what the parent writes and `"wikitext2"`. `"chat"` stands
                for conversations and short questions that the parent writes and answers.
            seed: Random seed.
            run_dir: Directory of texts and checkpoints; the same call with the same directory resumes. None keeps
                nothing.
            progress: Whether to show bars on stderr, or a function that is called with (what, done, total).
            **settings: Values of fields of `recovery.settings.RecoverySettings`.

        Returns:
            The recovered model with its record, without the figures of the old weights; this model where the deciding
            text says that recovery does not improve it.

        Raises:
            UserError: An argument is wrong, the text is too short, or `dense` is not the parent.
            OutputError: The directory cannot be written.
        """
        from selfpruner_hub.recovery.recover import Pair, recover  # Trainer takes a second to import

        started, method, budget = time.monotonic(), resolve(**settings), Budget(minutes, tokens)
        check_seed(seed)
        if count_parameters(dense) != self.report.parameters["dense"]:
            raise UserError(
                f"The model was pruned from one with {self.report.parameters['dense']:,} parameters; this one has "
                f"{count_parameters(dense):,}.",
                f"Give its parent, {self.report.base_model}.",
            )
        with contextlib.ExitStack() as stack:
            report = progress if callable(progress) else stack.enter_context(Bars(progress))
            folder = Path(run_dir or stack.enter_context(tempfile.TemporaryDirectory()))
            run = Run(MEMORY, Checkpoints(folder / "recovery"), report, seed)
            pair = Pair(self.model, dense, self.tokenizer)
            found = recover(pair, budget, data, method, run, folder / "recovery")
        if found.model is None:
            logger.warning("%s The model is left as it was.", found.line)
            run.checkpoints.clear()
            return self
        record = {**found.record, "seed": seed, "minutes": round((time.monotonic() - started) / 60, 1)}
        how = f"distilled from its parent on {record['tokens']:,} tokens in {record['minutes']} minutes"
        report_after = replace(self.report, metrics={}, recovery=record, method={**self.report.method, "training": how})
        return self._with(found.model, report_after, run.checkpoints)

    def _with(self, model: PreTrainedModel, report: Record, checkpoints: Checkpoints) -> Self:
        made = copy.copy(self)
        made.model, made.report, made._checkpoints = model, report, checkpoints
        return made
