"""What a runtime charges for each width of each part, measured once on a machine; and what it charges in the end."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters import machine
from exporters.benchmark.latency import Measured, interleaved
from exporters.benchmark.runtimes import RUNTIMES, Setting
from exporters.export import export_model
from exporters.writer import one_of, require
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.architectures import model_class, shape_of
from selfpruner_hub.models.modeling_selfpruned import WIDTHS
from selfpruner_hub.plans.costs import Costs
from selfpruner_hub.plans.plan import ModelShape, widths_of
from selfpruner_hub.plans.target import Target
from selfpruner_hub.storage.cost_table import Point, keep_table, read_table

LIBRARIES = {"torch": "torch", "onnx": "onnxruntime", "gguf": "xllamacpp"}
"""Runtimes of targets, and the library whose version a table is for."""
LAYER_WEIGHTS = 128_000_000
"""Largest number of weights in the layers of a model that is built to be measured: 512 MB in float32, far more than
what the caches of a processor hold."""
FFN_SHARES = (0.6, 0.3)
"""FFN widths that are measured, as shares of the dense width."""
RUNS, WARMUP = 21, 1
"""Passes that are timed, in turn, and passes before them. One pass of a quiet machine is off by a tenth."""
MARGIN = 8
"""Spare tokens of context."""
WEIGHTS = {".onnx", ".data", ".gguf", ".safetensors"}
"""Suffixes of files of weights."""
UNCOMPARED = 1e9
"""Tolerance of exports that are timed only: whether they say the same is not the question here."""
MEASURING = "measuring costs"
Report = Callable[..., None]


class RuntimeMeter:
    """Costs in one runtime, on the CPU, in its default dtype.

    Args:
        runtime: A key of `LIBRARIES`.
        runs: Number of passes that are timed; None takes `RUNS`.

    Raises:
        UserError: Targets cannot be measured in the runtime.
        MissingExtraError: Its library is not installed.
    """

    def __init__(self, runtime: str, runs: int | None = None) -> None:
        if runtime in RUNTIMES and runtime not in LIBRARIES:
            raise UserError(
                f"A target cannot be measured in {runtime}.", f"Choose one of {', '.join(LIBRARIES)}, or give beta."
            )
        self.name = one_of("runtime", runtime, tuple(LIBRARIES))
        if runtime != "torch":
            require(LIBRARIES[runtime], runtime)
        self._row = RUNTIMES[runtime]
        self._dtype = next(iter(self._row.dtypes))
        self._runs = RUNS if runs is None else runs

    def costs(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, target: Target, report: Report
    ) -> Costs:
        """Read the table of this model, runtime and machine, or measure it; see `Meter.costs`.

        Args:
            model: Dense model.
            tokenizer: Tokenizer of the model.
            target: Target, with the request that is timed.
            report: Callback, called with (what, done, total).

        Returns:
            The costs, in the unit of the target.

        Raises:
            UserError: The model cannot be exported for the runtime.
        """
        shape = shape_of(model.config)
        if target.quantity == "kv_cache":
            return Costs.linear(shape, 2 * shape.head_dim * self._row.dtypes[self._dtype][1], 0.0, unit=target.unit)
        key = self._key(model, shape, target)
        table = read_table(key) or keep_table(key, self._measured(model, tokenizer, shape, target, report))
        return table.costs(shape, target)

    def measure(
        self,
        dense: PreTrainedModel,
        pruned: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        target: Target,
        report: Report,
    ) -> tuple[float, float]:
        """Export both models and measure them one beside the other; see `Meter.measure`.

        Args:
            dense: Dense model.
            pruned: Pruned model.
            tokenizer: Tokenizer of both.
            target: Target that says what is counted.
            report: Callback, called with (what, done, total).

        Returns:
            What the dense and the pruned model cost, in the unit of the target; bytes of a KV cache are counted.
        """
        models = (dense, pruned)
        if target.quantity == "kv_cache":
            costs = [self.costs(model, tokenizer, target, report).dense for model in models]
        else:
            points = self._points([partial(_same, model) for model in models], tokenizer, target, report)
            costs = [point.cost(target) for point in points]
        return costs[0], costs[1]

    def _measured(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        shape: ModelShape,
        target: Target,
        report: Report,
    ) -> list[Point]:
        """Measure models with random weights: the dense one, and some of few layers with widths of their own."""
        groups = max(w.num_key_value_heads for w in shape.dense.layers)
        channels = max(w.intermediate_size for w in shape.dense.layers)
        weights = channels * shape.channel_weights + groups * shape.group_weights
        few = min(shape.num_layers, max(2, LAYER_WEIGHTS // weights))
        fewer = [] if shape.whole_attention else sorted({1, (groups + 1) // 2} - {groups})
        narrower = {round(share * channels) for share in FFN_SHARES} - {0, channels}
        widths = [(groups, channels), *((g, channels) for g in fewer), *((groups, f) for f in sorted(narrower))]
        whole = [(shape.num_layers, groups, channels)] if few < shape.num_layers else []
        sizes = [*whole, *((few, g, f) for g, f in widths)]
        points = self._points(
            [partial(_random_model, model, shape, *size) for size in sizes], tokenizer, target, report
        )
        return points if whole else [points[0], *points]

    def _points(
        self,
        makers: Sequence[Callable[[], PreTrainedModel]],
        tokenizer: PreTrainedTokenizerBase | None,
        target: Target,
        report: Report,
    ) -> list[Point]:
        """Export models and time them in turn; times are relative to those of the first, in the same turn."""
        total, done = len(makers) * (2 + WARMUP + self._runs), iter(range(10**9))
        setting = Setting(machine.threads(), self._row.device, self._dtype, target.prompt + target.new_tokens + MARGIN)
        found, runners = [], []
        with tempfile.TemporaryDirectory() as folder:
            for index, make in enumerate(makers):
                report(MEASURING, next(done), total)
                directory, model = Path(folder) / str(index), make()
                shape, vocabulary = shape_of(model.config), model.config.vocab_size
                self._write(model, tokenizer, directory, setting)
                del model
                report(MEASURING, next(done), total)
                runners.append(self._row.load(str(directory), setting))  # type: ignore[misc]
                size = sum(path.stat().st_size for path in directory.iterdir() if path.suffix in WEIGHTS)
                first = shape.dense.layers[0]
                found.append(
                    Point(shape.num_layers, first.num_key_value_heads, first.intermediate_size, 0.0, 0.0, size)
                )
            ids = torch.randint(vocabulary, (1, target.prompt), generator=torch.Generator().manual_seed(0))
            passes = interleaved(
                runners,
                ids,
                target.new_tokens,
                runs=self._runs,
                warmup=WARMUP,
                progress=lambda: report(MEASURING, next(done), total),
            )
            del runners
        report(MEASURING, total, total)
        return [
            replace(point, prefill=_beside(own, passes[0], "prefill"), decode=_beside(own, passes[0], "decode"))
            for point, own in zip(found, passes, strict=True)
        ]

    def _write(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path, setting: Setting
    ) -> None:
        """Save a model where the runtime loads it."""
        if self._row.options is None:
            model.save_pretrained(directory)
            return
        export_model(model, tokenizer, self.name, directory, tolerance=UNCOMPARED, **self._row.options(setting))

    def _key(self, model: PreTrainedModel, shape: ModelShape, target: Target) -> dict[str, object]:
        library = LIBRARIES[self.name]
        return {
            "model_type": model.config.model_type,
            "hidden_size": shape.hidden_size,
            "head_dim": shape.head_dim,
            "queries_per_group": shape.queries_per_group,
            "vocab_size": model.config.vocab_size,
            **widths_of(shape.dense),
            "runtime": self.name,
            "dtype": self._dtype,
            "threads": machine.threads(),
            "machine": machine.describe(self._row.device),
            "version": version(library),
            "prompt": target.prompt,
            "new_tokens": target.new_tokens,
        }


def _same(model: PreTrainedModel) -> PreTrainedModel:
    return model


def _beside(own: Sequence[Measured], reference: Sequence[Measured], phase: str) -> float:
    """Milliseconds of a phase: the reference's median, by the median ratio of passes that ran in the same turn."""
    theirs = [getattr(measured, phase) for measured in reference]
    ratios = [getattr(measured, phase) / time for measured, time in zip(own, theirs, strict=True)]
    return round(statistics.median(theirs) * statistics.median(ratios), 6)


def _random_model(
    dense: PreTrainedModel, shape: ModelShape, layers: int, groups: int, channels: int
) -> PreTrainedModel:
    """Build a model of the pruned class with random weights in float32, all of whose layers have the same widths."""
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
        return torch.nn.Module.float(model_class(dense.config)(config)).eval()
