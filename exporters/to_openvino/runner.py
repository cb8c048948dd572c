"""OpenVINO exports, timed, and opened for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from transformers import PreTrainedConfig

from exporters.opened import File, Graph
from exporters.runtime import CausalLMRunner, Setting
from exporters.to_openvino.causal_lm import GRAPH, OpenVinoCausalLM
from selfpruner_hub.storage.export_record import ExportRecord


def load(name: str, setting: Setting) -> CausalLMRunner:
    """Load an export for a benchmark; see `Format.load`."""
    return CausalLMRunner(OpenVinoCausalLM.from_pretrained(name, threads=setting.threads))


def files(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> Iterator[File]:
    """Yield the graph; see `ExportFormat.files`."""
    yield File(GRAPH, record.tolerance, lambda: Graph(OpenVinoCausalLM.from_pretrained(directory)))
