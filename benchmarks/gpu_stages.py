"""Seconds and memory of every stage of `prune`, for a random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from gpu_bench import Bench, measured, random_model
from transformers import PreTrainedModel

from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.texts import RunTexts
from selfpruner_hub.errors import SelfPrunerError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.devices import out_of_memory
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.pruning.prepare import fisher_information, prepared
from selfpruner_hub.pruning.sequential_repair import compensate
from selfpruner_hub.pruning.slicing import slice_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.search.find_plan import find_plan
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.proposers import EvolutionProposer
from selfpruner_hub.settings import resolve
from selfpruner_hub.storage.run import DEFAULT_RUN as RUN

BETA, EVALUATIONS = 0.3, 4
TOKENS = {"1b": 8192, "8b": 4096}
"""Tokens of each of the calibration text, the pass for the Fisher information, and the fitness text."""
WINDOW, TINY_WINDOW, TINY_TOKENS = 512, 32, 256
STAGES = (
    "Fisher information",
    "calibration, order, first repair",
    "seeds and search",
    "slicing",
    "second repair",
    "temperature",
)
Stage = Callable[[str], AbstractContextManager[None]]


def stages(bench: Bench, part: str, name: str) -> None:
    """Prune a random model stage by stage, with a row for each; after a stage that runs out of memory none can run.

    Args:
        bench: Device, sizes, results.
        part: Name of the part, for its rows.
        name: Name of the sizes.
    """
    tokens, window = (TINY_TOKENS, TINY_WINDOW) if bench.tiny else (TOKENS[name], WINDOW)
    done: list[str] = []

    @contextmanager
    def stage(called: str) -> Iterator[None]:
        done.append(called)
        row = {"stage": called, "model": name, "tokens": tokens, "evaluations": EVALUATIONS}
        figures: dict[str, float] = {}
        try:
            with measured(bench.device) as figures:
                yield
        except (RuntimeError, MemoryError, SelfPrunerError) as error:
            if out_of_memory(error) is not None:
                bench.keep(part, **row, **figures, **_memory(bench.device), out_of_memory=str(error).split("\n")[0])
            raise
        bench.keep(part, **row, **figures)

    try:
        with stage("building"):
            model = random_model(bench.sizes(name), bench.device)
        _prune(model, tokens, window, stage)
    except (RuntimeError, MemoryError, SelfPrunerError) as error:
        if out_of_memory(error) is None:
            raise
        for called in STAGES[len(done) - 1 :]:
            bench.keep(part, stage=called, model=name, skipped=f"{done[-1]} ran out of memory")


def _memory(device: torch.device) -> dict[str, float]:
    """Memory of a GPU in MB."""
    if device.type != "cuda":
        return {}
    return {"device_mb": round(torch.cuda.get_device_properties(device).total_memory / 1e6, 1)}


def _prune(model: PreTrainedModel, tokens: int, window: int, stage: Stage) -> None:
    """Do what `AutoPruner.prune` does, each of `STAGES` in a context of its own."""
    settings = resolve("default", evaluations=EVALUATIONS, window=window, fisher_tokens=tokens)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(model.config.vocab_size, (tokens // window, window), generator=generator) for _ in range(2)]
    texts = RunTexts(*(Corpus.of("random tokens", windows) for windows in drawn), unseen=None)
    calibration = texts.calibration.windows
    budget = Budget(shape_of(model.config), BETA)
    with stage("Fisher information"):
        fisher = fisher_information(model, calibration, settings, RUN)
    with ExitStack() as stack:
        with stage("calibration, order, first repair"):
            ready = stack.enter_context(prepared(model, calibration, settings, fisher, RUN))
        with stage("seeds and search"):
            result = find_plan(EvolutionProposer(budget), budget, ready, texts, Journal(None, {}), settings, RUN)
        with stage("slicing"):
            pruned = slice_model(ready.slicer, result.outcome.best.plan)
        del ready
    with stage("second repair"):
        compensate(model, pruned, calibration, fisher=fisher)
    with stage("temperature"):
        match_confidence(model, pruned, texts.search.windows)
