"""The two models in ONNX Runtime, in float32."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from model_source import record, shown
from tokens import tokenizer

from engines.base import FLOAT32, Engine, check_size, or_say, threads_text, warm
from engines.pytorch import Generating


def load(graphs: str) -> dict[str, Engine]:
    """Load the published graph, and the dense parent, which is converted to one.

    Args:
        graphs: Directory or Hub repository of the graphs.

    Returns:
        The pruned and the dense model.
    """
    with or_say("ONNX Runtime is not installed here."):
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        from exporters.to_onnx.causal_lm import default_options
        from exporters.to_onnx.hub_layout import FLOAT32_FILES, open_graph
        from exporters.to_onnx.writer import write_graph
        from selfpruner_hub.models.loading import load_model
    with or_say("The published ONNX graph cannot be loaded."):
        check_size("The pruned model", int(record()["parameters"]["pruned"]) * FLOAT32)
        folder = Path(graphs)
        if not folder.is_dir():
            folder = Path(snapshot_download(graphs, revision=shown().revision, allow_patterns=list(FLOAT32_FILES)))
        pruned = _engine(open_graph(folder, default_options()))
    weights = int(record()["parameters"]["dense"]) * FLOAT32
    check_size("For a conversion to ONNX, the dense model", 2 * weights)  # PyTorch's, and those of the graph
    with (
        or_say("The dense model cannot be converted to ONNX here."),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as made,
    ):
        revision = shown().parent_revision
        dense, _ = load_model(shown().parent, device="cpu", dtype=torch.float32, revision=revision)
        return {"pruned": pruned, "dense": _engine(write_graph(dense, Path(made)))}


def _engine(graph: Any) -> Engine:
    runtime = f"ONNX Runtime, float32, {threads_text(torch.get_num_threads())}"
    return warm(Generating(graph, tokenizer(), runtime))
