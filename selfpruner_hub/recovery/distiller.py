"""The training loop of recovery: transformers' Trainer, with the divergence from the parent as the loss."""

from __future__ import annotations

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from selfpruner_hub import ranks
from selfpruner_hub.models.patching import replaced
from selfpruner_hub.progress import Progress, noted
from selfpruner_hub.recovery.divergence import distilled
from selfpruner_hub.recovery.settings import RecoverySettings
from selfpruner_hub.recovery.texts import Text
from selfpruner_hub.storage.checkpoints import Clock

CLIP = 1.0
"""Maximum norm of the gradient."""
STATE = "trainer_state.json"
"""File that Trainer writes last into a checkpoint."""
INTERRUPTED, LATE, BROKEN = "interrupted", "out of time", "the loss was no number"
REASONS = ("", LATE, INTERRUPTED, BROKEN)
"""Reasons to stop before the last step; that of any process is the reason of all, the last one first."""


class Windows(Dataset[dict[str, Tensor]]):
    """The windows of all texts, in the order in which they are read.

    Args:
        texts: Texts.
        order: Pairs of the number of a text and the number of a window in it.
    """

    def __init__(self, texts: Sequence[Text], order: Sequence[tuple[int, int]]) -> None:
        self._texts, self._order = texts, order

    def __len__(self) -> int:
        """Number of windows that are read, with repeats."""
        return len(self._order)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        """One window: its token ids, `[W]`, and the counted predictions, `[W - 1]`."""
        number, window = self._order[place]
        text = self._texts[number]
        return {"input_ids": text.windows[window], "counted": text.counted[window]}


class Distiller(Trainer):
    """Trains a pruned model towards its parent.

    Args:
        student: Model with the weights that are trained.
        parent: The dense parent, on the device of the student.
        check: Function that measures the student: the lower, the better.
        dtype: Dtype of the products.
        **kwargs: Arguments of transformers' `Trainer`.
    """

    def __init__(
        self,
        student: nn.Module,
        parent: PreTrainedModel,
        check: Callable[[PreTrainedModel], float],
        dtype: torch.dtype,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=student, **kwargs)
        self.remove_callback(PrinterCallback)
        self._parent, self._check, self._dtype = parent, check, dtype
        if self.is_fsdp_enabled and dtype != torch.float32:  # accelerate's own policy adds gradients in bfloat16
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, torch.float32)
        self._divergence = math.nan

    @property
    def divergences(self) -> list[float]:
        """Divergence of each step so far, before a resume too."""
        return [entry["divergence"] for entry in self.state.log_history if "divergence" in entry]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Mean divergence from the parent over the counted predictions of a batch."""
        if not self.args.activation_checkpointing:  # which works in training mode alone
            model.eval()  # dropout would only add noise to what is matched
        student = self.accelerator.unwrap_model(model)
        loss = distilled(model, student, self._parent, inputs, self._dtype)
        self._divergence = ranks.averaged(loss.detach()).item()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Keep the divergence of each step in the history of the training."""
        super().log({**logs, "divergence": self._divergence} if "loss" in logs else logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Make the directory of a checkpoint, and write the weights.

        Trainer takes a checkpoint for the best one only if its directory is there after this. Of divided weights,
        which are written later, each process would look at another moment, and load a best checkpoint of its own.
        """
        Path(output_dir or cast(str, self.args.output_dir)).mkdir(parents=True, exist_ok=True)
        student: Any = self.accelerator.unwrap_model(self.model)
        # Trainer loads by the names of modules; the files of a stock mixture have a tensor for each expert.
        named = {"save_original_format": False} if isinstance(student, PreTrainedModel) else {}
        with replaced(student, "save_pretrained", partial(student.save_pretrained, **named)):
            super().save_model(output_dir, _internal_call)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measure the student on the deciding text."""
        student = self.accelerator.unwrap_model(self.model)
        student.eval()
        with torch.autocast(self.args.device.type, self._dtype, enabled=self._dtype != torch.float32):
            metrics = {"eval_score": self._check(student)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Pace(TrainerCallback):
    """Shows progress, and stops in time, on Ctrl-C, and where the loss is no number.

    Args:
        seconds: Time of all steps; None sets no limit.
        progress: Callback that receives the steps that are done.
        clock: Clock of the recovery, which is kept with each checkpoint.
    """

    def __init__(self, seconds: float | None, progress: Progress, clock: Clock) -> None:
        self._seconds, self._progress, self._clock = seconds, progress, clock
        self._deadline = math.inf
        self._interrupted = threading.Event()
        self.stopped = ""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the deadline; a resumed training has the time of the steps that are left."""
        if self._seconds is not None:
            self._deadline = time.monotonic() + self._seconds * (1 - state.global_step / state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop where there is a reason, and measure the model a last time."""
        late = time.monotonic() > self._deadline and state.global_step < state.max_steps
        reason = INTERRUPTED if self._interrupted.is_set() else LATE if late else ""
        self.stopped = REASONS[ranks.largest(REASONS.index(reason), args.device)]
        if self.stopped:
            control.should_training_stop = control.should_evaluate = control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep the time that was taken up to this checkpoint."""
        self._clock.keep()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the divergence, and stop where it is no number: no step from there on can be of use."""
        if not logs or "divergence" not in logs:
            return
        noted(self._progress, "recovering", state.global_step, state.max_steps, f"KL {logs['divergence']:.3f}")
        if not math.isfinite(logs["divergence"]):
            self.stopped = BROKEN
            control.should_training_stop = True
            control.should_evaluate = control.should_save = False

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the training after the current step; a second one interrupts as usual."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.getsignal(signal.SIGINT)

        def stop(*_: Any) -> None:
            self._interrupted.set()
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def arguments(
    folder: Path, device: torch.device, steps: int, checks: int, batch: int, settings: RecoverySettings, **more: Any
) -> TrainingArguments:
    """Arguments of transformers' Trainer.

    Args:
        folder: Directory of its checkpoints.
        device: Device of the models.
        steps: Number of steps.
        checks: Times that the model is measured and kept.
        batch: Windows in a step.
        settings: Settings of recovery.
        **more: Other arguments.

    Returns:
        The arguments.
    """
    every = -(-steps // checks)
    made = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        lr_scheduler_type="linear",
        warmup_steps=min(settings.warmup, steps // 4),
        optim="adamw_torch_fused",
        adam_beta2=settings.beta2,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        **more,
    )
    made._n_gpu = min(1, made.n_gpu)  # a lone process never splits a batch over several devices (DataParallel)
    if made.device.type == device.type == "cuda" and ranks.count() == 1:  # Trainer took the first one
        made.__dict__["_setup_devices"] = device
        torch.cuda.set_device(device)
    if not made.bf16:  # float32 weights, whatever the launcher was configured for
        made.mixed_precision = "no"
    return made


def last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint in a directory; what a killed process left half is deleted.

    Args:
        folder: Directory of the checkpoints.

    Returns:
        Its path; None without one.
    """
    while folder.is_dir() and (checkpoint := get_last_checkpoint(str(folder))):
        try:
            json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
            continue
        return checkpoint
    return None
