"""Measured costs in a runtime: of each width of each part, once on a machine, and of the pruned model in the end."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters import machine
from exporters.benchmark.latency import interleaved
from exporters.benchmark.worker import started
from exporters.export import export_model
from exporters.format import FORMATS, metered, runtimes
from exporters.runtime import SPARE_CONTEXT, Measured, Runner, Setting
from exporters.writer import one_of, require
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import (
    architecture_of,
    decoder_layers,
    expert_tensors,
    model_class,
    shape_of,
)
from selfpruner_hub.models.modeling_selfpruned import WIDTHS
from selfpruner_hub.models.placement import streams
from selfpruner_hub.models.weights import configuration_hash, count_parameters
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, widths_of
from selfpruner_hub.plans.target import Target
from selfpruner_hub.progress import Progress
from selfpruner_hub.storage.cost_table import Point, keep_table, read_table

LAYER_WEIGHTS = 128_000_000
"""Largest number of weights in the layers of a model that is built to be measured: 512 MB in float32, far more than
what the caches of a processor hold."""
FFN_SHARES = (0.6, 0.3)
"""FFN widths that are measured, as shares of the dense width."""
RUNS, METER_WARMUP = 21, 1
"""Passes that are timed, in turn, and passes before them. One pass of a quiet machine is off by a tenth."""
RUNS_OF_A_LOAD = 7
"""Passes of a model after which it is loaded anew: one load can be slower than the next for as long as it lasts,
which no number of passes averages out. A runtime of its own Python, which takes long to start, loads once."""
WEIGHT_SUFFIXES = {".onnx", ".data", ".gguf", ".safetensors"}
"""Suffixes of files of weights."""
MEASURING = "measuring costs"


class RuntimeMeter:
    """Costs in one runtime.

    A runtime that can is measured where the dense model is, if that is a CUDA device, and everything else on the CPU;
    llama.cpp is built here for the CPU. A runtime that loads PyTorch's files (PyTorch, vLLM) has the model's dtype.
    Exports have the default dtype of their runtime, or float16 on a GPU.

    Args:
        runtime: One of `exporters.format.metered()`.
        runs: Number of passes that are timed; None takes `RUNS`.
        python: Path of the Python of a runtime that has an environment of its own (`"vllm"`).

    Raises:
        UserError: Targets cannot be measured in the runtime, or its Python is missing or not wanted.
        MissingExtraError: Its library is not installed.
    """

    def __init__(self, runtime: str, runs: int | None = None, *, python: str | Path | None = None) -> None:
        possible = metered()
        if runtime in runtimes() and runtime not in possible:
            raise UserError(
                f"A target cannot be measured in {runtime}.", f"Choose one of {', '.join(possible)}, or give beta."
            )
        self.name = one_of("runtime", runtime, possible)
        self._row, self._python = FORMATS[runtime], python
        elsewhere = self._row.versions_elsewhere(python)
        if not elsewhere:
            require(self._row.library, self._row.extra)
        versions = [f"{name} {number}" for name, number in sorted(elsewhere.items())]
        self._version = ", ".join(versions) if versions else version(self._row.library)
        self._runs = RUNS if runs is None else runs

    def costs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, target: Target, progress: Progress
    ) -> Costs:
        """Read the table of this model, runtime and machine, or measure it; see `Meter.costs`.

        Args:
            model: Dense model.
            tokenizer: Tokenizer of the model.
            target: Target, with the request that is timed.
            progress: Callback, called with (what, done, total).

        Returns:
            The costs, in the unit of the target.

        Raises:
            UserError: The model cannot be exported for the runtime, or rests in files and nothing is counted.
        """
        shape = shape_of(model.config)
        if shape.expert_weights:
            return self._counted(model, shape, target)
        if target.quantity == "kv_cache":
            element = self._row.dtypes()[self._dtype(model, self._device(model))][1]
            return Costs.linear(shape, 2 * shape.head_dim * element, 0.0, unit=target.unit)
        if streams(model):
            raise UserError("Whole models are measured in memory; this one rests in files.", "Give beta or kv_cache=….")
        key = self._key(model, shape, target)
        table = read_table(key) or keep_table(key, self._measured(model, tokenizer, shape, target, progress))
        return table.costs(shape, target)

    def measure(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        target: Target,
        progress: Progress,
    ) -> tuple[float, float]:
        """Export both models and measure them one beside the other; see `Meter.measure`.

        Args:
            dense: Dense model.
            pruned: Pruned model.
            tokenizer: Tokenizer of both.
            target: Target, whose quantity is measured.
            progress: Callback, called with (what, done, total).

        Returns:
            Costs of the dense and the pruned model, in the unit of the target; bytes of a KV cache, and those of the
            weights of a mixture, are counted.
        """
        models = (dense, pruned)
        if target.quantity == "kv_cache" or shape_of(dense.config).expert_weights:
            costs = [self.costs(model, tokenizer, target, progress).dense for model in models]
        else:
            makers = [partial(lambda same: same, model) for model in models]
            points = self._points(makers, tokenizer, target, self._device(dense), progress)
            costs = [point.cost(target) for point in points]
        return costs[0], costs[1]

    def _counted(self, model: PreTrainedModel, shape: ModelShape, target: Target) -> Costs:
        """Count the bytes of a mixture's weights: one cost for all experts, and a constant."""
        if target.quantity != "memory" or self.name != "torch":
            raise UserError(
                f"A mixture of experts has no target {target.quantity} in {self.name}.",
                "Give memory=… in torch, whose weights are counted, or beta.",
            )
        architecture, expert = architecture_of(model.config), 0
        for layer in decoder_layers(model):
            tensors = expert_tensors(architecture, layer).values()
            expert = max(expert, sum(tensor.nbytes // tensor.shape[dimension] for tensor, dimension in tensors))
        parts = Costs.linear(shape, 0.0, expert, unit=target.unit)
        return replace(parts, constant=sum(p.nbytes for p in model.parameters()) - parts.prunable)

    def _measured(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        shape: ModelShape,
        target: Target,
        progress: Progress,
    ) -> list[Point]:
        """Measure models with random weights: the dense one, and some of few layers with widths of their own."""
        groups = max(w.num_key_value_heads for w in shape.dense.layers)
        channels = max(w.intermediate_size for w in shape.dense.layers)
        weights = channels * shape.unit_weights + groups * shape.group_weights
        few = min(shape.num_layers, max(2, LAYER_WEIGHTS // weights))
        fewer = [] if shape.whole_attention else sorted({1, (groups + 1) // 2} - {groups})
        narrower = {round(share * channels) for share in FFN_SHARES} - {0, channels}
        widths = [(groups, channels), *((g, channels) for g in fewer), *((groups, f) for f in sorted(narrower))]
        whole = [(shape.num_layers, groups, channels)] if few < shape.num_layers else []
        sizes = [*whole, *((few, g, f) for g, f in widths)]
        makers = [partial(_random_model, model, shape, *size) for size in sizes]
        points = self._points(makers, tokenizer, target, self._device(model), progress)
        return points if whole else [points[0], *points]

    def _points(
        self,
        makers: Sequence[Callable[[], PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase | None,
        target: Target,
        device: str,
        progress: Progress,
    ) -> list[Point]:
        """Export models; where times count, time them in turn, relative to the first model's in the same turn."""
        loads = max(1, self._runs // RUNS_OF_A_LOAD) if self._row.elsewhere is None else 1
        timed = target.unit == "ms"
        total, done = len(makers) * (1 + timed * (loads * (1 + METER_WARMUP) + self._runs)), iter(range(10**9))

        def step() -> None:
            progress(MEASURING, next(done), total)

        points, models = [], []
        with tempfile.TemporaryDirectory() as folder:
            for index, make in enumerate(makers):
                step()
                directory, model = Path(folder) / str(index), make()
                config, dtype = model.config, self._dtype(model, device)
                longest = target.prompt + target.new_tokens + SPARE_CONTEXT
                setting = Setting(machine.usable_threads(), device, dtype, longest, models=len(makers))
                models.append(self._saved(model, tokenizer, directory, setting))
                del model
                shape = shape_of(config)
                first = shape.dense.layers[0]
                size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix in WEIGHT_SUFFIXES)
                points.append(
                    Point(shape.num_layers, first.num_key_value_heads, first.intermediate_size, 0.0, 0.0, size)
                )
            passes = self._passes(models, config.vocab_size, target, loads, step) if timed else []
        progress(MEASURING, total, total)
        if not timed:
            return points
        return [
            replace(point, prefill=_beside(own, passes[0], "prefill"), decode=_beside(own, passes[0], "decode"))
            for point, own in zip(points, passes, strict=True)
        ]

    def _passes(
        self,
        models: Sequence[tuple[str, Setting]],
        vocabulary: int,
        target: Target,
        loads: int,
        step: Callable[[], None],
    ) -> list[list[Measured]]:
        """Load all models some times, and time them in turn after each; the passes of each model."""
        ids = torch.randint(vocabulary, (1, target.prompt), generator=torch.Generator().manual_seed(0))
        passes: list[list[Measured]] = [[] for _ in models]
        for load in range(loads):
            with ExitStack() as processes:
                runners = []
                for name, setting in models:
                    step()
                    runners.append(self._runner(name, setting, processes))
                runs = self._runs * (load + 1) // loads - self._runs * load // loads
                measured = interleaved(runners, ids, target.new_tokens, runs=runs, warmup=METER_WARMUP, progress=step)
                del runners  # before their files
            for passes_of_model, more in zip(passes, measured, strict=True):
                passes_of_model.extend(more)
        return passes

    def _saved(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path, setting: Setting
    ) -> tuple[str, Setting]:
        """Save a model where the runtime loads it; return that place, and the settings for loading it."""
        if self._row.exported is not None:
            to, options = self._row.export_format or self.name, self._row.exported(setting)
            export_model(model, tokenizer, to, directory, tolerance=math.inf, **options)
            return str(directory), setting
        model.save_pretrained(directory)
        if self._row.elsewhere is None:
            return str(directory), setting
        place = directory.with_name(f"{directory.name}-staged")
        name = self._row.elsewhere.staged(str(directory), model.config, {}, place)
        return name, replace(setting, python=str(self._python), staged=name != str(directory))

    def _runner(self, name: str, setting: Setting, processes: ExitStack) -> Runner:
        """Load a model in this process, or in one of the runtime's own Python."""
        if self._row.load is not None:
            return self._row.load(name, setting)
        return processes.enter_context(started(self.name, name, setting))

    def _device(self, dense: PreTrainedModel) -> str:
        """Device on which the runtime is measured, as PyTorch names it."""
        return str(dense.device) if dense.device.type == "cuda" and self._row.on_gpu else self._row.device

    def _dtype(self, model: PreTrainedModel, device: str) -> str:
        """Name of the dtype that the model has in the runtime."""
        dtype = str(model.dtype).removeprefix("torch.")
        dtypes = self._row.dtypes()
        if self._row.exported is None and dtype in dtypes:
            return dtype
        return "float16" if device.startswith("cuda") else next(iter(dtypes))

    def _key(self, model: PreTrainedModel, shape: ModelShape, target: Target) -> dict[str, object]:
        device = self._device(model)
        return {
            "model_type": model.config.model_type,
            "hidden_size": shape.hidden_size,
            "head_dim": shape.head_dim,
            "queries_per_group": shape.queries_per_group,
            "vocab_size": model.config.vocab_size,
            "parameters": count_parameters(model),
            "configuration": configuration_hash(model.config),
            **widths_of(shape.dense),
            "runtime": self.name,
            "dtype": self._dtype(model, device),
            "threads": machine.usable_threads(),
            "machine": machine.describe_machine(device),
            "version": self._version,
            "unit": target.unit,
            "prompt": target.prompt,
            "new_tokens": target.new_tokens,
        }


def _beside(passes: Sequence[Measured], reference: Sequence[Measured], phase: str) -> float:
    """Milliseconds of a phase: the reference's median, by the median ratio of passes that ran in the same turn."""
    theirs = [getattr(measured, phase) for measured in reference]
    ratios = [getattr(measured, phase) / time for measured, time in zip(passes, theirs, strict=True)]
    return round(statistics.median(theirs) * statistics.median(ratios), 6)


def _random_model(
    dense: PreTrainedModel, shape: ModelShape, layers: int, groups: int, channels: int
) -> PreTrainedModel:
    """Build a model of the pruned class with random weights, all of whose layers have the same widths.

    A runtime that loads PyTorch's files has it in the model's dtype, and exports have a dtype of their own.
    """
    values = dense.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version", "dtype"):
        values.pop(key, None)
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    widths = dict(zip(WIDTHS, (groups * shape.queries_per_group, groups, channels), strict=True))
    values |= {"num_hidden_layers": layers, "head_dim": shape.head_dim}
    values["per_layer_config"] = {index: dict(widths) for index in range(layers)}
    config = model_class(dense.config).config_class(**values)  # type: ignore[misc]
    config._attn_implementation_internal = dense.config._attn_implementation_internal
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.nn.Module.to(model_class(dense.config)(config), dense.dtype).eval()
