"""Results of a benchmark: a versioned record, and a table for the terminal."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from exporters.benchmark.latency import Timing
from exporters.benchmark.workload import Workload
from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.storage.model_record import Metric
from selfpruner_hub.storage.versioned_json import parse_versioned

REPORT_VERSION = 1
COLUMNS = f"{'':24} {'dense':>18} {'pruned':>18} {'speed-up':>14} {'ideal':>6} {'tokens/s':>16}"
"""Head of the lines of cases."""


@dataclass(frozen=True)
class Phase:
    """Figures of one phase: prefill (reading the prompts) or decode (one token)."""

    dense: Timing
    """Milliseconds for the whole batch."""
    pruned: Timing
    speedup: Timing
    """Time of the dense model divided by that of the pruned one, for passes that ran one after the other."""
    ideal: float | None
    """Ratio of the work, dense to pruned: floating-point operations for prefill, bytes read for decode; None of
    mixtures of experts."""
    dense_tokens_per_second: float
    pruned_tokens_per_second: float

    @property
    def faster(self) -> bool:
        """Whether the median speed-up minus half its spread is above 1."""
        return self.speedup.median - self.speedup.spread / 2 > 1


@dataclass(frozen=True)
class Case:
    """Figures of one batch size and prompt length."""

    batch: int
    prompt: int
    """Tokens of each prompt."""
    new_tokens: int
    prefill: Phase
    decode: Phase

    def lines(self) -> list[str]:
        """Format the figures for a terminal, one line for each phase, under `COLUMNS`."""
        lines = []
        for name in _PHASES:
            phase: Phase = getattr(self, name)
            ideal = f"{phase.ideal:.2f}×" if phase.ideal else ""
            rate = f"{phase.dense_tokens_per_second:.1f} → {phase.pruned_tokens_per_second:.1f}"
            lines.append(
                f"{f'{name}, {self.batch} × {self.prompt}':24} {_cell(phase.dense, ' ms'):>18} "
                f"{_cell(phase.pruned, ' ms'):>18} {_cell(phase.speedup, '×'):>14} {ideal:>6} {rate:>16}"
            )
        return lines


@dataclass(frozen=True)
class Quality:
    """Perplexity of one of the two models, in the runtime, and the text on which it was measured."""

    perplexity: float
    text: str
    windows: int
    """Number of windows of the text, each predicted on its own."""
    window: int
    """Tokens of a window."""


@dataclass(frozen=True)
class Side:
    """Name, workload, memory and quality of one of the two models."""

    name: str
    workload: Workload | None
    """Sizes of its matrices; None of a mixture of experts."""
    memory: dict[str, float]
    """Memory of its process in MB (10⁶ bytes): `peak_mb` while it ran, `loading_mb` while it was loaded (both with
    libraries), and `gpu_mb`, what PyTorch allocated on a GPU."""
    quality: Quality | None = None
    """Perplexity; None where no text was given."""


@dataclass(frozen=True)
class BenchmarkReport:
    """The record of a benchmark; its field names are the JSON keys."""

    runtime: str
    dtype: str
    device: str
    threads: int
    machine: dict[str, str | int]
    versions: dict[str, str]
    dense: Side
    pruned: Side
    cases: tuple[Case, ...]
    schema_version: int = REPORT_VERSION

    def to_json(self) -> str:
        """Serialise to JSON, with the schema version first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> BenchmarkReport:
        """Read a report, and refuse unknown or missing keys.

        Args:
            text: Content of the JSON file.
            source: Name of the file, for error messages.

        Returns:
            The report.

        Raises:
            SavedModelError: The text is not such a record.
        """
        values = parse_versioned(text, source, REPORT_VERSION, cls)
        try:
            sides = {key: _side(values[key]) for key in _SIDES}
            cases = tuple(Case(**{**case, **{key: _phase(case[key]) for key in _PHASES}}) for case in values["cases"])
            return cls(**{**values, **sides, "cases": cases})
        except (TypeError, KeyError) as error:
            raise SavedModelError(f"{source} is damaged: {error}.", "Run the benchmark again.") from error

    def metrics(self) -> dict[str, Metric]:
        """Milliseconds of both models and the protocol, as metrics for a model's record and card."""
        where = str(self.machine.get("gpu", self.machine["processor"]))
        today = datetime.now(UTC).date().isoformat()
        metrics = {}
        for case in self.cases:
            for name, what in (("prefill", "reading the prompt"), ("decode", "a token after it")):
                phase: Phase = getattr(case, name)
                metrics[f"{name} in {self.runtime}, {case.batch} × {case.prompt} tokens"] = Metric(
                    value=round(phase.pruned.median, 2),
                    dense=round(phase.dense.median, 2),
                    protocol=f"{what}; {self.dtype}, {self.threads} threads; medians of {phase.dense.runs} passes, "
                    f"dense and pruned turn by turn, median of their ratios {phase.speedup.median:.2f}"
                    + (f", {phase.ideal:.2f} by work" if phase.ideal else ""),
                    unit="ms",
                    machine=where,
                    date=today,
                )
        if self.dense.quality is not None and (quality := self.pruned.quality) is not None:
            metrics[f"perplexity in {self.runtime}, {self.dtype}"] = Metric(
                value=round(quality.perplexity, 3),
                dense=round(self.dense.quality.perplexity, 3),
                protocol=f"{quality.windows} windows of {quality.window} tokens",
                date=today,
                dataset=quality.text,
            )
        return metrics

    def table(self) -> str:
        """Format the figures for a terminal, and mark where the pruned model is not faster."""
        where = self.machine.get("gpu", self.machine["processor"])
        lines = [
            f"{self.runtime}, {self.dtype}, {self.threads} threads, {where}: {self.pruned.name} against "
            f"{self.dense.name}; medians ± half the interquartile range of {self.cases[0].prefill.dense.runs} "
            "interleaved passes",
            COLUMNS,
            *(line for case in self.cases for line in case.lines()),
        ]
        for key, what in (("peak_mb", "peak memory"), ("gpu_mb", "GPU memory")):
            if key in self.dense.memory:
                before, after = (f"{side.memory[key]:.0f} MB" for side in (self.dense, self.pruned))
                lines.append(f"{what:24} {before:>18} {after:>18}")
        if self.dense.quality is not None and (quality := self.pruned.quality) is not None:
            before, after = (f"{each.perplexity:.2f}" for each in (self.dense.quality, quality))
            lines.append(f"{'perplexity':24} {before:>18} {after:>18}  {quality.windows} windows of {quality.text}")
        slow = [
            f"{name} of {case.batch} × {case.prompt} ({getattr(case, name).speedup.median:.2f}×)"
            for case in self.cases
            for name in _PHASES
            if not getattr(case, name).faster
        ]
        if slow:
            lines.append(f"The pruned model is not faster, or not by more than the spread: {', '.join(slow)}.")
        return "\n".join(lines)


_SIDES, _PHASES = ("dense", "pruned"), ("prefill", "decode")


def _side(values: dict[str, Any]) -> Side:
    kinds: dict[str, type[Workload | Quality]] = {"workload": Workload, "quality": Quality}
    read = {key: kind(**values[key]) for key, kind in kinds.items() if values.get(key) is not None}
    return Side(**{**values, **read})


def _phase(values: dict[str, Any]) -> Phase:
    timings = {key: Timing(**values[key]) for key in ("dense", "pruned", "speedup")}
    return Phase(**{**values, **timings})


def _cell(timing: Timing, unit: str) -> str:
    return f"{timing.median:.2f} ± {timing.spread / 2:.2f}{unit}"
