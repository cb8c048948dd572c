"""Measured speed-up of a pruned model over its dense parent in one runtime, and the ideal speed-up."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from exporters import machine
from exporters.benchmark.latency import interleaved, timing
from exporters.benchmark.report import COLUMNS, BenchmarkReport, Case, Phase, Quality, Side
from exporters.benchmark.worker import Worker, started
from exporters.benchmark.workload import workload_of
from exporters.export import export
from exporters.format import FORMATS, Format, runtimes
from exporters.runtime import SPARE_CONTEXT, Setting
from exporters.to_onnx.hub_layout import read_configuration
from exporters.writer import one_of
from selfpruner_hub.calibration.corpus import Corpus, consecutive_windows
from selfpruner_hub.errors import SelfPrunerError, UserError
from selfpruner_hub.models.loading import explain, load_config, text_config
from selfpruner_hub.progress import Progress, silent
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, read_export

logger = logging.getLogger(__name__)

WARMUP = 2
"""Warm-up passes of each model, which are not counted."""
RECORDED_LIBRARIES = ("selfpruner-hub", "torch", "transformers")
"""Distributions whose versions are recorded, beside the libraries of the formats."""
QUALITY_WINDOW, QUALITY_WINDOWS = 512, 16
"""Tokens of a window of text, and number of windows whose perplexity is measured."""
BENCHMARK_PROMPTS = (128, 512)
"""Lengths of the prompts by default, in tokens, if the models were made to read as many."""


@dataclass(frozen=True)
class Passes:
    """The passes that are timed."""

    batches: Sequence[int] = ()
    """Batch sizes (prompts at a time), each at least 1; none takes the runtime's default."""
    prompts: Sequence[int] = ()
    """Lengths of the prompts, in tokens, each at least 1; none takes the `BENCHMARK_PROMPTS` that fit."""
    new_tokens: int = 32
    """Number of tokens generated after each prompt, at least 1."""
    runs: int = 7
    """Number of counted passes of each model, at least 2, after two warm-up passes."""
    threads: int | None = None
    """Number of CPU threads; None takes PyTorch's number, at most the cores that this process may use."""
    dtype: str | None = None
    """Dtype of the weights, as the runtime names it; None takes the runtime's default."""
    device: str | None = None
    """`"cpu"`, or a GPU as PyTorch names it; None takes the runtime's default."""
    python: str | Path | None = None
    """Path of the Python of a runtime that has an environment of its own (`"vllm"`)."""
    text: str | None = None
    """Text whose perplexity is measured too: `"wikitext2"`, `"c4"`, or a path; None measures none."""

    def checked(self, runtime: Format) -> Passes:
        """Check the values, and fill in the batches of a runtime.

        Args:
            runtime: Runtime of the passes.

        Returns:
            The same with batches.

        Raises:
            UserError: A value is out of its range, or not for this runtime.
        """
        if self.dtype is not None:
            one_of("dtype", self.dtype, tuple(runtime.dtypes()))
        batches = self.batches or runtime.batches
        if not batches or min(*batches, *self.prompts, self.new_tokens, 1) < 1 or self.runs < 2:
            raise UserError("Batches, prompts and new tokens must be at least 1, and runs at least 2.")
        if not runtime.batched and max(batches) > 1:
            raise UserError(f"{runtime.name} is timed on one prompt at a time.", "Leave --batch out.")
        if self.text is not None and not runtime.scored:
            raise UserError(f"{runtime.name} is timed here, not scored on text.", "Leave out the text.")
        return replace(self, batches=batches)

    def setting(self, runtime: Format) -> Setting:
        """Make the settings for loading either model; batches and prompts must be filled in.

        Args:
            runtime: Runtime of the passes.

        Returns:
            The settings.

        Raises:
            UserError: The device is not here.
        """
        device = self.device or runtime.device
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(
                f"{runtime.name} cannot run on {device}: PyTorch sees no NVIDIA GPU here.", "Choose another runtime."
            )
        dtype = self.dtype or next(iter(runtime.dtypes()))
        longest = max(*self.prompts, 0 if self.text is None else QUALITY_WINDOW) + self.new_tokens + SPARE_CONTEXT
        threads, python = self.threads or machine.usable_threads(), str(self.python or "")
        return Setting(threads, device, dtype, longest, max(self.batches), python=python)


@dataclass(frozen=True)
class _Model:
    """One of the two models: its name and configuration, and where the runtime finds it."""

    side: str
    name: str
    loading: dict[str, Any]
    config: PreTrainedConfig

    @property
    def title(self) -> str:
        """Name for the report."""
        return Path(self.name).resolve().name if Path(self.name).exists() else self.name

    def placed(self, runtime: Format, setting: Setting, folder: Path) -> tuple[str, Setting]:
        """Lay the model out in a folder as the runtime loads it; return its path, and the settings for loading it."""
        if runtime.exported is not None:
            to, options = runtime.export_format or runtime.name, runtime.exported(setting)
            if (Path(self.name) / EXPORT_RECORD_FILE).is_file():
                self._check_export(options)
                return self.name, setting
            return str(export(self.name, to, folder / self.side, loading=self.loading, **options)), setting
        if runtime.elsewhere is not None:
            place = runtime.elsewhere.staged(self.name, self.config, self.loading, folder / self.side)
            return place, replace(setting, staged=place != self.name, models=2)
        return self.name, replace(setting, loading=self.loading)

    def _check_export(self, options: dict[str, Any]) -> None:
        """Refuse an export in another dtype than the one that is timed, where an export is in one dtype."""
        wanted, made = options.get("dtype"), read_export(Path(self.name)).options.get("dtype")
        if None not in (wanted, made) and wanted != made:
            raise UserError(
                f"{self.name!r} is an export in {made}, and {wanted} would be timed.",
                f"Ask for dtype={made} (--dtype {made}), or give an export in {wanted}.",
            )


def benchmark(
    pruned: str | Path,
    against: str | Path,
    runtime: str = "torch",
    passes: Passes = Passes(),
    *,
    exports: str | Path | None = None,
    loading: dict[str, Any] | None = None,
    progress: Progress = silent,
) -> BenchmarkReport:
    """Time a pruned model and its parent in turn, each in its own process.

    Args:
        pruned: Pruned model, saved or exported for the runtime; a directory or a Hub repository.
        against: Dense parent, or its export for the runtime; a directory or a Hub repository.
        runtime: One of `exporters.format.runtimes()`. Models that are not yet exported for it are exported first.
        passes: Passes to time.
        exports: Directory that keeps the exports, in `dense` and `pruned`; None deletes them at the end.
        loading: Keyword arguments of transformers' `from_pretrained` for the parent: `gguf_file`, `revision`, …
        progress: Callback, called with (what, done, total).

    Returns:
        The report of all measurements.

    Raises:
        UserError: An argument is wrong, a library is missing, or a model cannot be loaded or exported.
        SelfPrunerError: A runtime failed, or computed a perplexity that is no number; what was timed before is logged.
    """
    row = FORMATS[one_of("runtime", runtime, runtimes())]
    passes = passes.checked(row)
    elsewhere = row.versions_elsewhere(passes.python)
    models = _models(str(against), str(pruned), loading or {})
    passes = replace(passes, prompts=_fitting(passes, models))
    setting = passes.setting(row)
    corpus = _windows(passes.text, models[0]) if passes.text is not None else None
    with _workers(row, models, setting, exports) as workers:
        cases: list[Case] = []
        try:
            for size in itertools.product(passes.batches, passes.prompts):
                cases.append(_case(workers, models, row.dtypes()[setting.dtype], passes, size, progress))
            memory = [worker.memory() for worker in workers]  # of the timed passes: logits of whole windows take more
            quality = [None if corpus is None else _quality(worker, corpus) for worker in workers]
        except (SelfPrunerError, KeyboardInterrupt):
            if cases:
                lines = (line for case in cases for line in case.lines())
                logger.warning("Timed before it ended:\n%s", "\n".join((COLUMNS, *lines)))
            raise
    dense_side, pruned_side = (
        Side(model.title, workload_of(model.config), peak, score)
        for model, peak, score in zip(models, memory, quality, strict=True)
    )
    return BenchmarkReport(
        runtime=runtime,
        dtype=setting.dtype,
        device=setting.device,
        threads=setting.threads,
        machine=machine.describe_machine(setting.device),
        versions={**dict(_versions()), **elsewhere},
        dense=dense_side,
        pruned=pruned_side,
        cases=tuple(cases),
    )


@contextlib.contextmanager
def _workers(
    runtime: Format, models: Sequence[_Model], setting: Setting, exports: str | Path | None
) -> Iterator[list[Worker]]:
    """Place both models where the runtime loads them, and start a process for each; exports may be kept."""
    with contextlib.ExitStack() as stack:
        folder = exports if runtime.exported is not None else None
        folder = Path(folder or stack.enter_context(tempfile.TemporaryDirectory()))
        places = [model.placed(runtime, setting, folder) for model in models]  # before any process takes memory
        yield [stack.enter_context(started(runtime.name, place, how)) for place, how in places]


def _fitting(passes: Passes, models: Sequence[_Model]) -> Sequence[int]:
    """Return the lengths of the prompts: those given, or the `BENCHMARK_PROMPTS` that fit, or the longest that fits."""
    context = min(model.config.max_position_embeddings for model in models) - SPARE_CONTEXT
    usual = [prompt for prompt in BENCHMARK_PROMPTS if prompt + passes.new_tokens <= context]
    lengths = passes.prompts or usual or [max(1, context - passes.new_tokens)]
    if max(lengths) + passes.new_tokens > context:
        raise UserError(
            f"A prompt of {max(lengths)} tokens and {passes.new_tokens} after it are more than {context}, all that the "
            f"models were made to read but {SPARE_CONTEXT}.",
            "Ask for fewer.",
        )
    return lengths


def _models(dense: str, pruned: str, loading: dict[str, Any]) -> list[_Model]:
    """Read the configurations of both models, which must share a vocabulary."""
    parent = _Model("dense", dense, loading, _config(dense, loading))
    placed = {name: value for name, value in loading.items() if name == "device_map"}  # as the parent
    child = _Model("pruned", pruned, placed, _config(pruned, {}))
    if parent.config.vocab_size != child.config.vocab_size:
        raise UserError(f"{dense!r} and {pruned!r} have different vocabularies.", "Give the model's own parent.")
    return [parent, child]


def _config(name: str, loading: dict[str, Any]) -> PreTrainedConfig:
    return read_configuration(Path(name)) or text_config(load_config(name, any_architecture=True, **loading))


def _windows(text: str, model: _Model) -> Corpus:
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.name, **{**model.loading, "trust_remote_code": False})
    except Exception as error:  # transformers and the Hub client share no base class
        raise explain(model.name, error) from error
    window = min(QUALITY_WINDOW, model.config.max_position_embeddings)
    return consecutive_windows(text, tokenizer, window, QUALITY_WINDOWS)


def _quality(worker: Worker, corpus: Corpus) -> Quality:
    loss = worker.cross_entropy(corpus.windows)
    if not loss < math.log(sys.float_info.max):
        raise SelfPrunerError(f"A model has no finite perplexity on {corpus.name} here.", "Choose another dtype.")
    return Quality(math.exp(loss), corpus.name, *corpus.windows.shape)


def _case(
    workers: Sequence[Worker],
    models: Sequence[_Model],
    sizes: tuple[float, float],
    passes: Passes,
    size: tuple[int, int],
    progress: Progress,
) -> Case:
    """Time passes of one size: prompts at a time, and tokens of each."""
    (batch, prompt), new_tokens = size, passes.new_tokens
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(models[0].config.vocab_size, (batch, prompt), generator=generator)
    total, done = (passes.runs + WARMUP) * len(workers), iter(range(1, 10**9))
    measured = interleaved(
        workers,
        ids,
        new_tokens,
        runs=passes.runs,
        warmup=WARMUP,
        progress=lambda: progress(f"batch {batch}, prompt {prompt}", next(done), total),
    )
    dense, pruned = (workload_of(model.config) for model in models)
    operations = read = None
    if dense and pruned:
        context = prompt + new_tokens // 2
        operations = dense.prefill_flops(batch, prompt) / pruned.prefill_flops(batch, prompt)
        read = dense.decode_bytes(batch, context, *sizes) / pruned.decode_bytes(batch, context, *sizes)
    return Case(
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        prefill=_phase([[one.prefill for one in model] for model in measured], batch * prompt, operations),
        decode=_phase([[one.decode for one in model] for model in measured], batch, read),
    )


def _phase(milliseconds: list[list[float]], tokens: int, ideal: float | None) -> Phase:
    dense, pruned = (timing(values) for values in milliseconds)
    return Phase(
        dense=dense,
        pruned=pruned,
        # Ratios of passes that ran one after the other: a temporary slowdown of the machine affects both.
        speedup=timing([before / after for before, after in zip(*milliseconds, strict=True)]),
        ideal=ideal and round(ideal, 4),
        dense_tokens_per_second=round(1000 * tokens / dense.median, 1),
        pruned_tokens_per_second=round(1000 * tokens / pruned.median, 1),
    )


def _versions() -> Iterator[tuple[str, str]]:
    of_formats = [library for each in FORMATS.values() for library in each.libraries]
    for library in (*RECORDED_LIBRARIES, *of_formats):
        with contextlib.suppress(PackageNotFoundError):
            yield library, version(library)
