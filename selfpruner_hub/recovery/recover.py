"""Recovery: distil a pruned model from its dense parent, and keep the result only if it is better."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.text_sources import tokenizer_hash
from selfpruner_hub.errors import OutputError, UserError
from selfpruner_hub.models.devices import fork_rng
from selfpruner_hub.models.placement import streams
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.pruning.temperature import TOKENS, match_confidence
from selfpruner_hub.recovery.deciding import Deciding, is_better, score
from selfpruner_hub.recovery.distiller import Distiller, Pace, Windows, arguments, distilled, last_checkpoint
from selfpruner_hub.recovery.schedule import Timed, planned, remembered, scheduled
from selfpruner_hub.recovery.settings import Budget, RecoverySettings
from selfpruner_hub.recovery.texts import Text, Writer, shares
from selfpruner_hub.recovery.trainable import compute_dtype, finished, trainable, uses_adapters
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


class Recovered(NamedTuple):
    """Result of a recovery."""

    model: PreTrainedModel | None
    """The recovered model; None where the deciding text says that it is not better."""
    record: dict[str, Any]
    """Entry of the model's record."""

    @property
    def line(self) -> str:
        """What came of it, in one line."""
        told = ", ".join(
            f"{text['before']:.3f} -> {text['after']:.3f} on {text['name']}" for text in self.record["deciding"]
        )
        stopped = f" (stopped: {self.record['stopped']})" if self.record["stopped"] else ""
        verdict = "brought the model nearer to its parent" if self.model is not None else "did not improve the model"
        return f"Recovery on {self.record['tokens']} tokens{stopped} {verdict}: KL {told}."


def recover(pair: Pair, budget: Budget, data: Any, settings: RecoverySettings, run: Run, folder: Path) -> Recovered:
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
    pruned, parent, tokenizer = pair
    _check_pair(pruned, parent)
    window = min(settings.window, getattr(parent.config, "max_position_embeddings", settings.window))
    batch = max(1, settings.batch_tokens // window)
    adapters, dtype = uses_adapters(pruned, settings), compute_dtype(pruned)
    kinds = shares(data, tokenizer, settings)
    identity = json.dumps(
        [
            *(identity_of(model) for model in (pruned, parent)),
            *(tokenizer_hash(tokenizer), sorted(end_tokens(parent, tokenizer))),
            *(asdict(budget), settings.record(), run.seed, [(kind.name, kind.share) for kind in kinds]),
        ]
    )
    run = replace(run, checkpoints=run.checkpoints.of(identity))
    writer = Writer(parent, tokenizer, window, run)

    deciding, writing = writer.deciding()
    with _undisturbed(pruned.device):
        student = trainable(pruned, settings, adapters)
        if (schedule := remembered(run.checkpoints)) is None:
            step = 0.0 if budget.minutes is None else _seconds(student, parent, deciding, batch, dtype)
            timed = Timed(writing, step, time.monotonic() - started)
            schedule = planned(budget, kinds, batch, window, settings, timed)
            remembered(run.checkpoints, schedule)
        # What is read is read anew, and may have changed: the training goes on where all texts are the same.
        pairs = [writer.training(kind, n, settings.passes) for kind, n in zip(kinds, schedule.counts, strict=True)]
        texts, deciding = [text for text, _ in pairs], [*deciding, *(held for _, held in pairs if held is not None)]
        order = scheduled(texts, schedule.counts, run.seed)
        hashes = "".join(text.sha256 for text in (*texts, *deciding))
        folder = folder / f"training-{sha256((identity + hashes).encode()).hexdigest()[:16]}"
        measure = Deciding(parent, deciding)
        before = measure(pruned)
        distiller = Distiller(
            student,
            parent,
            lambda model: score(before, measure(model)),
            dtype,
            args=arguments(
                folder,
                pruned.device,
                schedule.steps,
                schedule.checks(batch, sum(len(text.windows) for text in deciding), settings),
                batch,
                settings,
                learning_rate=settings.rate(pruned.num_parameters(), adapters),
                bf16=dtype == torch.bfloat16,
                seed=run.seed,
            ),
            train_dataset=Windows(texts, order, settings.emphasis),
            eval_dataset=Windows(deciding, [], 0.0),  # Trainer asks for one; `check` measures
        )
        pace = Pace(schedule.seconds, run.progress)
        distiller.add_callback(pace)
        with _writable(folder), pace.interruptible():
            distiller.train(resume_from_checkpoint=last_checkpoint(folder))
        model = finished(student, pruned)
    read = torch.stack([texts[number].windows[place] for number, place in order[: max(1, TOKENS // window)]])
    match_confidence(parent, model, read, run.progress)
    after = measure(model)
    state = distiller.state
    record = {
        "method": "lora" if adapters else "full",
        "learning_rate": distiller.args.learning_rate,
        "steps": state.global_step,
        "tokens": state.global_step * batch * window,
        "stopped": pace.stopped,
        "settings": settings.record(),
        "texts": [text.record(count) for text, count in zip(texts, schedule.counts, strict=True)],
        "deciding": [
            {"name": text.name, "tokens": int(text.counted.sum()), "before": round(was, 5), "after": round(now, 5)}
            for text, was, now in zip(deciding, before, after, strict=True)
        ],
        "curve": curve(distiller.divergences, batch * window),
    }
    return Recovered(model if is_better(before, after) else None, record)


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


def _seconds(
    student: nn.Module, parent: PreTrainedModel, texts: Sequence[Text], batch: int, dtype: torch.dtype
) -> float:
    """Time the passes of a step; the second of two, because the first prepares kernels. No weight changes."""
    windows = torch.cat([text.windows for text in texts])[:batch].to(parent.device)
    counted = torch.cat([text.counted for text in texts])[:batch].to(parent.device)
    inputs = {"input_ids": windows, "counted": counted, "emphasis": torch.zeros(len(windows), device=parent.device)}
    seconds = 0.0
    for _ in range(2):
        started = time.monotonic()
        with torch.autocast(parent.device.type, dtype, enabled=dtype != torch.float32):
            loss, divergence = distilled(student, cast(PreTrainedModel, student), parent, inputs, dtype)
        loss.backward()
        divergence.item()  # waits for an accelerator
        student.zero_grad(set_to_none=True)
        seconds = time.monotonic() - started
    return seconds * batch / len(windows)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Keep the global random states, which Trainer sets, let it take this device, and keep transformers quiet."""
    states = random.getstate(), np.random.get_state()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    current = nullcontext() if device.type == "cpu" else torch.accelerator.device_index(device.index or 0)
    with fork_rng(device), current:
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Turn what goes wrong while a checkpoint is written into one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        full = folder.is_dir() and shutil.disk_usage(folder).free < 1 << 20
        if isinstance(error, RuntimeError) and not full:  # torch.save raises it where the disk is full
            raise
        raise OutputError(
            f"Cannot write a checkpoint of the recovery in {folder}: {error}.",
            "Make room, or choose another run directory; the same command resumes.",
        ) from error
