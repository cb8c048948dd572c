"""Seconds and memory of every stage of `prune`, for a random model; how fast it writes, and how it is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from tempfile import TemporaryDirectory

import torch
from gpu_bench import Bench, measured, random_model
from torch import Tensor
from transformers import PreTrainedModel

from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.calibration.texts import RunTexts
from selfpruner_hub.errors import SelfPrunerError
from selfpruner_hub.models.architectures import decoder_layers, shape_of
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
from selfpruner_hub.storage.offload import DiskStore, HostStore
from selfpruner_hub.storage.run import DEFAULT_RUN as RUN

BETA, EVALUATIONS = 0.3, 4
TOKENS = {"1b": 8192, "8b": 4096, "8b-layer": 73_728}
"""Tokens of each of the calibration text, the pass for the Fisher information, and the fitness text; one layer reads as
many as a default run."""
ROWS, PROMPT, WRITTEN = 256, 16, 64
"""Texts that are written at once, and their tokens before and after."""
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


def writing(bench: Bench, part: str, name: str) -> None:
    """Let a random model write many texts at once, as it does for calibration."""
    rows, written = (4, 8) if bench.tiny else (ROWS, WRITTEN)
    model = random_model(bench.sizes(name), bench.device)
    prompts = [[3 + (row + place) % 200 for place in range(PROMPT)] for row in range(rows)]
    continuations(model, prompts, 2, temperature=0.0)  # kernels are prepared
    with measured(bench.device) as figures:
        continuations(model, prompts, written, temperature=0.0)
    speed = round(rows * written / figures["seconds"])
    bench.keep(part, model=name, rows=rows, prompt=PROMPT, tokens=written, tokens_per_second=speed, **figures)


def copies(bench: Bench, part: str, name: str) -> None:
    """Copy one layer to the device from pageable memory, from pinned memory, and from files that are in memory."""
    (layer,) = decoder_layers(random_model({**bench.sizes(name), "num_hidden_layers": 1}, torch.device("cpu")))
    size = sum(parameter.nbytes for parameter in layer.parameters())
    with TemporaryDirectory() as folder:
        files = DiskStore(folder)
        places: dict[str, Callable[[Tensor], Tensor]] = {"memory": torch.clone, "files": files}
        if bench.device.type == "cuda":
            places["pinned memory"] = HostStore(pinned=True)
        for place, put in places.items():
            for parameter in layer.parameters():
                parameter.data = put(parameter.data)
            for _ in range(2):  # the first one reads what the second one finds in memory
                with measured(bench.device) as figures:
                    moved = [parameter.to(bench.device, copy=True) for parameter in layer.parameters()]
                del moved
            speed = round(size / 1e9 / max(figures["seconds"], 1e-3), 4)  # a tiny layer takes no time
            bench.keep(part, model=name, resting=place, mb=round(size / 1e6, 1), gb_per_second=speed)


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
