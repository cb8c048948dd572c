"""ONNX exports in ONNX Runtime, timed, and opened for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from transformers import PreTrainedConfig

from exporters.graph_causal_lm import GraphCausalLM
from exporters.opened import File, Graph
from exporters.runtime import CausalLMRunner, Setting
from exporters.to_onnx import export_options
from exporters.to_onnx.causal_lm import DEFAULT_PROVIDERS, OnnxCausalLM, default_options
from exporters.to_onnx.hub_layout import BITS, HubGraph, file_of
from exporters.to_onnx.matrix_bits import rounded
from exporters.to_onnx.writer import ONNX_TOLERANCES
from selfpruner_hub.storage.export_record import ExportRecord


def load(name: str, setting: Setting) -> CausalLMRunner:
    """Load an export for a benchmark; see `Format.load`."""
    provider = DEFAULT_PROVIDERS[export_options(setting)["fusions"]]
    model = OnnxCausalLM.from_pretrained(name, providers=[provider], threads=setting.threads)
    return CausalLMRunner(model, model.device)


def files(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> Iterator[File]:
    """Yield the graph, or all graphs of the layout hub; see `ExportFormat.files`."""
    if not record.has_hub_layout:
        load = partial(OnnxCausalLM.from_pretrained, directory)
        yield _file("model.onnx", record.tolerance, record.options["dtype"], load)
        return
    for dtype, allowed in {**ONNX_TOLERANCES, "float32": record.tolerance}.items():
        name = file_of(dtype)
        yield _file(name, allowed, dtype, partial(_hub_graph, directory / name, config))


def _hub_graph(path: Path, config: PreTrainedConfig) -> HubGraph:
    return HubGraph(path, config, default_options())


def _file(name: str, tolerance: float, dtype: str, load: Callable[[], GraphCausalLM]) -> File:
    """Compare a graph in 8 or 4 bits with PyTorch whose matrices are rounded in the same way."""
    if dtype not in BITS:
        return File(name, tolerance, lambda: Graph(load()))
    return File(name, tolerance, lambda: Graph(load(), rounded=True), partial(rounded, bits=BITS[dtype]))
