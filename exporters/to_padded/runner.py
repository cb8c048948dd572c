"""Padded models, opened for comparison."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from exporters.opened import File, Graph
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.export_record import ExportRecord


def files(directory: Path, record: ExportRecord, config: PreTrainedConfig, longest: int) -> Iterator[File]:
    """Yield the model; see `Format.files`."""

    def opened() -> Graph:
        return Graph(load_model(str(directory), device="cpu", dtype=torch.float32)[0])

    yield File("the padded model", record.tolerance, opened)
