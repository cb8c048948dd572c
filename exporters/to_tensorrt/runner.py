"""TensorRT engines, timed, and opened for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig

from exporters.opened import File, Graph
from exporters.runtime import CausalLMRunner, Setting
from exporters.to_tensorrt.causal_lm import ENGINE, TensorRtCausalLM
from selfpruner_hub.storage.export_record import ExportRecord


def load(name: str, setting: Setting) -> CausalLMRunner:
    """Load an export for a benchmark; see `Format.load`."""
    model = TensorRtCausalLM.from_pretrained(name)
    return CausalLMRunner(model, model.device)


def files(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> Iterator[File]:
    """Yield the engine; see `ExportFormat.files`."""
    yield File(ENGINE, record.tolerance, lambda: Graph(TensorRtCausalLM.from_pretrained(directory)))
