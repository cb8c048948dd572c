"""Tokens a second of a random dense model and of pruned ones: PyTorch with CUDA graphs, ONNX Runtime, TensorRT."""

from __future__ import annotations

import gc
import importlib.util
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_bench import Bench, measured, random_model, shape
from torch import Tensor
from transformers import Cache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from exporters.benchmark.compare import Passes, benchmark
from exporters.benchmark.latency import timing
from exporters.benchmark.workload import workload_of
from exporters.export import export_model
from exporters.format import FORMATS
from exporters.runtime import CausalLMRunner, Measured, Setting
from exporters.to_tensorrt.causal_lm import capture
from exporters.to_tensorrt.library import find_library
from selfpruner_hub.errors import MissingExtraError, SelfPrunerError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.devices import out_of_memory
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.plans.seeds import seeds

BATCHES, PROMPT, NEW_TOKENS, RUNS = (1, 16, 64), 512, 32, 5
TINY_BATCHES, TINY_PROMPT, TINY_TOKENS, TINY_RUNS = (1, 3), 12, 4, 2
BETAS = (0.3, 0.5)
PHASES = ("prefill", "decode")
FEWER = {"num_hidden_layers": 4, "vocab_size": 16384}
"""Changes of the sizes of exports, which take minutes at full depth."""
Capture = Callable[[Callable[[], None]], Callable[[], object]]


class Kind(NamedTuple):
    """A kind of plan: a seed plan, and how the budget rounds it."""

    name: str
    seed: str
    tied: bool
    multiple_of: int

    def plan(self, sizes: dict[str, Any], beta: float) -> Plan:
        """Return the plan of this kind for a model of these sizes."""
        budget = Budget(shape(sizes), beta, tied=self.tied, multiple_of=self.multiple_of)
        return budget.project(seeds(budget)[self.seed])


KINDS = (
    Kind("uniform rates of the FFN", "uniform", False, 1),
    Kind("ramp, tied: FFN in multiples of 64, and KV heads that differ between layers", "ramp", True, 64),
    Kind("uniform rates of the FFN in multiples of 64", "uniform", False, 64),
)
"""Seed plans that need no statistics: the default's, the paper's tied rates, and the default's in even widths."""


class _Prompt(DynamicLayer):
    """The cache of one layer in prefill: it writes keys and values into a static one, and returns them as they are.

    A static cache of its own would make the model's mask depend on a tensor, which no CUDA graph can.
    """

    def __init__(self, into: StaticLayer) -> None:
        super().__init__()
        self._into = into

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        length = key_states.shape[2]
        self._into.keys[:, :, :length].copy_(key_states)
        self._into.values[:, :, :length].copy_(value_states)
        return key_states, value_states


class GraphRunner(CausalLMRunner):
    """Greedy generation in tensors of fixed size and address, so that prefill and a decode step are CUDA graphs.

    The prompt is in `ids` `[B, P]`; `token` `[B, 1]` is the latest new token.

    Args:
        model: Dense or pruned model without sliding windows.
        batch: Number of prompts.
        prompt: Tokens of each prompt.
        new_tokens: Number of decode steps after each prompt, at most.
        capture: Function that captures a function as a CUDA graph and returns its replay; None runs it as it is.
    """

    def __init__(
        self, model: PreTrainedModel, batch: int, prompt: int, new_tokens: int, capture: Capture | None = None
    ) -> None:
        super().__init__(model, model.device)
        device = self.device
        length, geometry = prompt + new_tokens, shape_of(model.config)
        self._cache = StaticCache(model.config, length)
        heads = [widths.num_key_value_heads for widths in geometry.dense.layers]
        self._cache.early_initialization(batch, heads, [geometry.head_dim] * len(heads), model.dtype, device)
        self.ids = torch.zeros(batch, prompt, dtype=torch.long, device=device)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self._places = torch.arange(prompt, device=device)[None]
        self._place = torch.zeros(1, dtype=torch.long, device=device)
        self._mask = torch.zeros(batch, 1, 1, length, dtype=torch.bool, device=device)
        self.prefill, self.step = (self._ready(each, capture) for each in (self._read, self._write))

    @torch.inference_mode()
    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `exporters.runtime.Runner.measure`."""
        self.ids.copy_(ids)
        start = self._now()
        self.prefill()
        read = self._now()
        for _ in range(new_tokens):
            self.step()
        return Measured(1000 * (read - start), 1000 * (self._now() - read) / new_tokens)

    @torch.inference_mode()
    def _ready(self, function: Callable[[], None], capture: Capture | None) -> Callable[[], object]:
        if capture is None:
            return function
        function()  # a library that allocates at its first call cannot do so in a graph
        return capture(function)

    @torch.inference_mode()
    def _read(self) -> None:
        """Read the prompts from `ids`, and begin anew behind them."""
        prompt = self.ids.shape[1]
        cache = Cache(layers=[_Prompt(layer) for layer in self._cache.layers])
        out = self.model(self.ids, position_ids=self._places, cache=cache, use_cache=True, logits_to_keep=1)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(prompt)
        self._place.fill_(prompt)
        self._mask[..., :prompt].fill_(True)
        self._mask[..., prompt:].fill_(False)

    @torch.inference_mode()
    def _write(self) -> None:
        """Append `token`, and replace it by the next one."""
        self._mask.index_fill_(3, self._place, True)
        out = self.model(
            self.token,
            attention_mask=self._mask,
            position_ids=self._place[None],
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.token.copy_(out.logits.argmax(-1))
        self._place.add_(1)


def speed(bench: Bench, part: str, name: str) -> None:
    """Time the dense model, then pruned ones, on batches of prompts; a row for each model and batch.

    Args:
        bench: Device, sizes, clock, results.
        part: Name of the part, for its rows.
        name: Name of the sizes.
    """
    sizes, dense = bench.sizes(name), dict[int, dict[str, Any]]()
    cases = [("dense", 0.0, None), *((kind.name, beta, kind.plan(sizes, beta)) for kind in KINDS for beta in BETAS)]
    longest = 0.0
    for plan_name, beta, plan in cases:
        row = {"model": name, "plan": plan_name, "beta": beta}
        if bench.left() < longest:
            bench.keep(part, **row, skipped=f"{max(bench.left(), 0):.0f} s were left; a model took {longest:.0f} s")
            continue
        before = bench.left()
        model = random_model(sizes, bench.device, plan)
        for batch in TINY_BATCHES if bench.tiny else BATCHES:
            _forget(bench.device)
            try:
                times = _timed(bench, model, batch)
            except torch.OutOfMemoryError as error:
                bench.keep(part, **row, batch=batch, out_of_memory=str(error).split("\n")[0])
                continue
            if plan is None:
                dense[batch] = times
            bench.keep(part, **row, **_public(times), **_gain(dense.get(batch), times))
        del model
        _forget(bench.device)
        longest = max(longest, before - bench.left())


def _has_graphs(device: torch.device) -> bool:
    return device.type == "cuda"


def _forget(device: torch.device) -> None:
    """Free the memory of earlier graphs; a runner and its functions refer to each other."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _timed(bench: Bench, model: PreTrainedModel, batch: int) -> dict[str, Any]:
    """Time one batch; prefill and decode are `Timing`s in milliseconds."""
    prompt, new_tokens, runs = (TINY_PROMPT, TINY_TOKENS, TINY_RUNS) if bench.tiny else (PROMPT, NEW_TOKENS, RUNS)
    graphs: bool | str = _has_graphs(bench.device)
    with measured(bench.device) as memory:
        try:
            runner = GraphRunner(model, batch, prompt, new_tokens, capture if graphs else None)
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                raise
            graphs = f"no: {str(error).splitlines()[0]}"
            runner = GraphRunner(model, batch, prompt, new_tokens)
        ids = torch.randint(model.config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(0))
        runner.measure(ids, new_tokens)
        passes = [runner.measure(ids, new_tokens) for _ in range(runs)]
    work = workload_of(model.config)
    return {
        "batch": batch,
        "prompt": prompt,
        "new_tokens": new_tokens,
        "cuda_graphs": graphs,
        "peak_mb": memory["peak_mb"],
        "prefill": timing([each.prefill for each in passes]),
        "decode": timing([each.decode for each in passes]),
        "work": {
            "prefill": work.prefill_flops(batch, prompt),
            "decode": work.decode_bytes(batch, prompt + new_tokens, 2, 2),  # the whole static cache is read
        },
    }


def _public(row: dict[str, Any]) -> dict[str, Any]:
    """A row's figures: times, and tokens a second of the whole batch."""
    figures = {key: value for key, value in row.items() if key not in (*PHASES, "work")}
    for phase, tokens in (("prefill", row["batch"] * row["prompt"]), ("decode", row["batch"])):
        figures[phase] = {
            "milliseconds": asdict(row[phase]),
            "tokens_per_second": round(1000 * tokens / row[phase].median, 1),
        }
    return figures


def _gain(dense: dict[str, Any] | None, row: dict[str, Any]) -> dict[str, Any]:
    """Speed-up over the dense model, as measured and as the work would have it; nothing where that did not run."""
    if dense is None:
        return {}
    return {
        "speedup": {phase: round(dense[phase].median / row[phase].median, 4) for phase in PHASES},
        "ideal": {phase: round(dense["work"][phase] / row["work"][phase], 4) for phase in PHASES},
    }


def exported(bench: Bench, part: str, runtime: str) -> None:
    """Export a dense and two pruned models of fewer layers, and time them in another runtime.

    Args:
        bench: Device, sizes, results.
        part: Name of the part, for its rows.
        runtime: One of `exporters.format.runtimes()`.
    """
    if (missing := _missing(bench.device, runtime)) is not None:
        bench.keep(part, runtime=runtime, not_installed=missing)
        return
    sizes = bench.sizes("8b") | ({} if bench.tiny else FEWER)
    batches, prompt, new_tokens, runs = (
        (TINY_BATCHES, TINY_PROMPT, TINY_TOKENS, TINY_RUNS) if bench.tiny else (BATCHES, PROMPT, NEW_TOKENS, RUNS)
    )
    dtype = "float32" if bench.device.type == "cpu" else "float16"
    setting = Setting(1, str(bench.device), dtype, prompt + new_tokens + 8, max(batches))
    options = FORMATS[runtime].exported
    kind = KINDS[1]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for beta in (0.0, *BETAS):
            row = {"runtime": runtime, "layers": sizes["num_hidden_layers"], "plan": kind.name, "beta": beta}
            try:
                model = random_model(sizes, bench.device, kind.plan(sizes, beta) if beta else None)
                export_model(model, None, runtime, folder / f"{beta}", **options(setting))  # type: ignore[misc]
                del model
                if beta:
                    passes = Passes(batches, (prompt,), new_tokens, runs, dtype=dtype, device=str(bench.device))
                    report = benchmark(folder / f"{beta}", folder / "0.0", runtime, passes)
                    for case in report.cases:
                        bench.keep(part, **row, dtype=dtype, **asdict(case))
            except SelfPrunerError as error:
                bench.keep(part, **row, failed=error.message)
                if not beta:
                    return


def _missing(device: torch.device, runtime: str) -> str | None:
    """What of a runtime is not installed; None if it can run."""
    if runtime == "tensorrt":
        try:
            find_library()
        except MissingExtraError as error:
            return error.message
        return None
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed."
    import onnxruntime

    if device.type == "cuda" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return "onnxruntime-gpu is not installed: this onnxruntime has no CUDAExecutionProvider."
    return None
