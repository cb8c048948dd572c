"""Measured speed-up of a pruned model over its dense parent in one runtime, and the ideal speed-up."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedConfig

from exporters import machine
from exporters.benchmark.latency import interleaved, timing
from exporters.benchmark.report import Case, Phase, Quality, Report, Side
from exporters.benchmark.worker import Worker, started
from exporters.benchmark.workload import workload_of
from exporters.export import export
from exporters.format import RUNTIMES, Runtime, Setting, versions_elsewhere
from exporters.to_onnx.hub_layout import read_configuration
from exporters.vllm import other_python
from exporters.writer import one_of
from selfpruner_hub.calibration.corpus import Corpus, consecutive_windows
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.loading import explain, load_config, text_config
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE

WARMUP = 2
"""Warm-up passes of each model, which are not counted."""
LIBRARIES = (
    *("selfpruner-hub", "torch", "transformers", "onnxruntime", "onnxruntime-genai", "xllamacpp", "tensorrt"),
    "openvino",
)
WINDOW, WINDOWS = 512, 16
"""Tokens of a window of text, and number of windows whose perplexity is measured."""
PROMPTS = (128, 512)
"""Lengths of the prompts by default, in tokens, if the models were made to read as many."""
MARGIN = 8
"""Spare tokens of context beyond the longest sequence."""
Progress = Callable[[str, float, float], None]


def benchmark(
    pruned: str | Path,
    against: str | Path,
    runtime: str = "torch",
    *,
    batches: Sequence[int] = (),
    prompts: Sequence[int] = (),
    new_tokens: int = 32,
    runs: int = 7,
    threads: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    exports: str | Path | None = None,
    python: str | Path | None = None,
    text: str | None = None,
    loading: dict[str, Any] | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Time a pruned model and its parent in turn, each in its own process.

    Args:
        pruned: Pruned model, saved or exported for the runtime; a directory or a Hub repository.
        against: Dense parent, or its export for the runtime; a directory or a Hub repository.
        runtime: Key of `RUNTIMES`. Models that are not yet exported for it are exported first.
        batches: Batch sizes (prompts at a time), each at least 1; none takes the runtime's default.
        prompts: Lengths of the prompts, in tokens, each at least 1; none takes those of `PROMPTS` that fit.
        new_tokens: Number of tokens generated after each prompt, at least 1.
        runs: Number of counted passes of each model, at least 2, after two warm-up passes.
        threads: Number of CPU threads; None takes PyTorch's number, at most the cores that this process may use.
        dtype: Dtype of the weights, as the runtime names it; None takes the runtime's default.
        device: `"cpu"`, or a GPU as PyTorch names it; None takes the runtime's default.
        exports: Directory that keeps the exports, in `dense` and `pruned`; None deletes them at the end.
        python: Path of the Python of a runtime that has an environment of its own (`"vllm"`).
        text: Text whose perplexity is measured too: `"wikitext2"`, `"c4"`, or a path; None measures none.
        loading: Keyword arguments of transformers' `from_pretrained` for the parent: `gguf_file`, `revision`, …
        progress: Callback, called with (what, done, total).

    Returns:
        The report of all measurements.

    Raises:
        UserError: An argument is wrong, a library is missing, or a model cannot be loaded or exported.
    """
    row = RUNTIMES[one_of("runtime", runtime, tuple(RUNTIMES))]
    dtype = one_of("dtype", dtype or next(iter(row.dtypes)), tuple(row.dtypes))
    batches = batches or row.batches
    _check(row, runtime, batches, prompts, new_tokens, runs)
    if text is not None and not row.scored:
        raise UserError(f"{runtime} is timed here, not scored on text.", "Leave out the text.")
    elsewhere = versions_elsewhere(runtime, python)
    threads = threads or machine.threads()
    names = (str(against), str(pruned))
    loadings: tuple[dict[str, Any], dict[str, Any]] = (loading or {}, {})
    configs = [_config(name, keywords) for name, keywords in zip(names, loadings, strict=True)]
    if configs[0].vocab_size != configs[1].vocab_size:
        raise UserError(f"{names[0]!r} and {names[1]!r} have different vocabularies.", "Give the model's own parent.")
    prompts = _fitting(prompts, new_tokens, min(config.max_position_embeddings for config in configs))
    device = device or row.device
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"{runtime} cannot run on {device}: PyTorch sees no NVIDIA GPU here.", "Choose another runtime."
        )
    read = _windows(text, configs[0], str(against), loading or {}) if text is not None else None
    longest = max(*prompts, WINDOW if read is not None else 0) + new_tokens + MARGIN
    setting = Setting(threads, device, dtype, longest, max(batches))
    with contextlib.ExitStack() as stack:
        if row.options is not None:
            directory = Path(exports or stack.enter_context(tempfile.TemporaryDirectory()))
            loaded = [
                _exported(name, row.format or runtime, directory / side, keywords, row.options(setting))
                for name, side, keywords in zip(names, ("dense", "pruned"), loadings, strict=True)
            ]
            settings = [setting, setting]
        elif row.program is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            loaded = [
                other_python.staged(name, config, keywords, folder / side)
                for name, config, keywords, side in zip(names, configs, loadings, ("dense", "pruned"), strict=True)
            ]
            settings = [
                replace(setting, python=str(python), staged=own != name, models=len(names))
                for own, name in zip(loaded, names, strict=True)
            ]
        else:
            loaded, settings = list(names), [replace(setting, loading=keywords) for keywords in loadings]
        workers = [stack.enter_context(started(runtime, name, how)) for name, how in zip(loaded, settings, strict=True)]
        cases = [
            _case(workers, configs, row.dtypes[dtype], batch, prompt, new_tokens, runs, progress)
            for batch in batches
            for prompt in prompts
        ]
        memory = [worker.memory() for worker in workers]  # of the timed passes: logits of whole windows take more
        quality = [None if read is None else _quality(worker, read) for worker in workers]
    dense, own = (
        Side(Path(name).resolve().name if Path(name).exists() else name, workload_of(config), used, found)
        for name, config, used, found in zip(names, configs, memory, quality, strict=True)
    )
    return Report(
        runtime=runtime,
        dtype=dtype,
        device=device,
        threads=threads,
        machine=machine.describe(device),
        versions={**dict(_versions()), **elsewhere},
        dense=dense,
        pruned=own,
        cases=tuple(cases),
    )


def _check(
    row: Runtime, runtime: str, batches: Sequence[int], prompts: Sequence[int], new_tokens: int, runs: int
) -> None:
    if not batches or min(*batches, *prompts, new_tokens, 1) < 1 or runs < 2:
        raise UserError("Batches, prompts and new tokens must be at least 1, and runs at least 2.")
    if not row.batched and max(batches) > 1:
        raise UserError(f"{runtime} is timed on one prompt at a time.", "Leave --batch out.")


def _fitting(prompts: Sequence[int], new_tokens: int, context: int) -> Sequence[int]:
    """Return the prompts, or those of `PROMPTS` that fit in the context with the tokens after them, or what fits."""
    usual = [prompt for prompt in PROMPTS if prompt + new_tokens <= context]
    asked = prompts or usual or [max(1, context - new_tokens)]
    if max(asked) + new_tokens > context:
        raise UserError(
            f"A prompt of {max(asked)} tokens and {new_tokens} after it are more than the {context} that the models "
            "were made to read.",
            "Ask for fewer.",
        )
    return asked


def _config(name: str, loading: dict[str, Any]) -> PreTrainedConfig:
    return read_configuration(Path(name)) or text_config(load_config(name, any_architecture=True, **loading))


def _windows(text: str, config: PreTrainedConfig, name: str, loading: dict[str, Any]) -> Corpus:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **{**loading, "trust_remote_code": False})
    except Exception as error:  # transformers and the Hub client share no base class
        raise explain(name, error) from error
    window = min(WINDOW, config.max_position_embeddings)
    return consecutive_windows(text, tokenizer, window, WINDOWS)


def _quality(worker: Worker, read: Corpus) -> Quality:
    return Quality(math.exp(worker.cross_entropy(read.windows)), read.name, *read.windows.shape)


def _exported(name: str, to: str, output: Path, loading: dict[str, Any], options: dict[str, Any]) -> str:
    """Return the directory of a model's export: `name` if it is an export, else a new one in `output`."""
    if (Path(name) / EXPORT_RECORD_FILE).is_file():
        return name
    return str(export(name, to, output, loading=loading, **options))


def _case(
    workers: Sequence[Worker],
    configs: Sequence[PreTrainedConfig],
    sizes: tuple[float, float],
    batch: int,
    prompt: int,
    new_tokens: int,
    runs: int,
    progress: Progress,
) -> Case:
    ids = torch.randint(configs[0].vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
    total, done = (runs + WARMUP) * len(workers), iter(range(1, 10**9))
    passes = interleaved(
        workers,
        ids,
        new_tokens,
        runs=runs,
        warmup=WARMUP,
        progress=lambda: progress(f"batch {batch}, prompt {prompt}", next(done), total),
    )
    work = [workload_of(config) for config in configs]
    context = prompt + new_tokens // 2
    flops = [w.prefill_flops(batch, prompt) for w in work]
    read = [w.decode_bytes(batch, context, *sizes) for w in work]
    return Case(
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        prefill=_phase([[m.prefill for m in own] for own in passes], batch * prompt, flops[0] / flops[1]),
        decode=_phase([[m.decode for m in own] for own in passes], batch, read[0] / read[1]),
    )


def _phase(milliseconds: list[list[float]], tokens: int, ideal: float) -> Phase:
    dense, pruned = (timing(values) for values in milliseconds)
    return Phase(
        dense=dense,
        pruned=pruned,
        # Ratios of passes that ran one after the other: a temporary slowdown of the machine affects both.
        speedup=timing([before / after for before, after in zip(*milliseconds, strict=True)]),
        ideal=round(ideal, 4),
        dense_tokens_per_second=round(1000 * tokens / dense.median, 1),
        pruned_tokens_per_second=round(1000 * tokens / pruned.median, 1),
    )


def _versions() -> Iterator[tuple[str, str]]:
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            yield library, version(library)
