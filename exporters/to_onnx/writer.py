"""ONNX: one decode graph with a KV cache that serves prefill and steps, by transformers' exporter."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.metadata
import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import Step, expected, logit_difference
from exporters.to_onnx.attention_operator import OPSET, attending_by_operator
from exporters.to_onnx.causal_lm import DEFAULT_PROVIDERS, OnnxCausalLM, default_options
from exporters.to_onnx.int8 import quantize
from exporters.tracing import decode_step, tracing
from exporters.writer import Written, one_line, one_of, require
from selfpruner_hub.errors import ExportError

TOLERANCES = {"float32": 1e-3, "float16": 0.1, "int8": 1.0}
"""Allowed distance of a logit from PyTorch's float32, by dtype."""
FUSIONS = tuple(DEFAULT_PROVIDERS)
_ORT_FUSIONS: dict[str, Literal["cpu", "cuda"] | None] = {"cpu": "cpu", "cuda": "cuda", "none": None}
EXTRA = "onnx"


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    dtype: str = "float32",
    fusions: str = "cpu",
) -> Written:
    """Write `model.onnx`, its weights beside it, and the configuration; compare its logits with PyTorch's.

    Args:
        model: A dense or pruned model, float32, on the CPU.
        tokenizer: Not needed.
        staging: Where the files go.
        dtype: `"float32"`, `"float16"`, or `"int8"` (weights of matrix products in blocks, everything else float32).
        fusions: The provider of ONNX Runtime whose own operators the graph is fused into: `"cpu"` or `"cuda"`; `"none"`
            leaves a plain graph for TensorRT and other runtimes.

    Returns:
        What was written.

    Raises:
        UserError: An option is unknown, or a library is missing.
        ExportError: The model cannot be traced.
    """
    one_of("dtype", dtype, tuple(TOLERANCES))
    one_of("fusions", fusions, FUSIONS)
    for library in ("onnx", "onnxscript", "onnxruntime"):
        require(library, EXTRA)
    half = dtype == "float16"
    exported = trace(nn.Module.half(copy.deepcopy(model)) if half else model, fusions)
    if dtype == "int8":
        component = exported.components["model"]
        component.program = quantize(component.program)
    exported.save_pretrained(staging)
    del exported
    gc.collect()  # graphs are full of cycles, and the runtime is about to load the weights
    runnable = _can_run(fusions)
    return Written(
        options={"dtype": dtype, "fusions": fusions},
        libraries=("onnx", "onnxscript", importlib.metadata.packages_distributions()["onnxruntime"][0]),
        tolerance=TOLERANCES[dtype],
        measure=partial(_difference, expected(model), staging, fusions) if runnable else None,
        unchecked="" if runnable else f"this onnxruntime has no {DEFAULT_PROVIDERS[fusions]}",
    )


def trace(model: PreTrainedModel, fusions: str) -> Any:
    """Trace the decode graph of a model.

    Args:
        model: Of the dtype that the graph shall have.
        fusions: One of `FUSIONS`.

    Returns:
        transformers' `ExportedModel`: `.program` is the graph as an `onnx_ir.Model`, which shares the model's weights.

    Raises:
        ExportError: torch or the exporter could not trace it.
    """
    from onnx_ir.passes import common
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs, shapes = decode_step(model)
    # On a GPU, ONNX Runtime has operators of its own for what transformers attends with; TensorRT fuses by itself.
    attending, opset = (attending_by_operator(model), OPSET) if fusions == "cpu" else (contextlib.nullcontext(), None)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=_ORT_FUSIONS[fusions], opset_version=opset)
    try:
        with tracing(model), attending:
            exported = OnnxExporter().export(model, inputs, config)
    except Exception as error:  # torch.export, torch.onnx and the exporters share no base class
        raise ExportError(f"{type(model).__name__} cannot be traced to ONNX: {one_line(error)}") from error
    exported.generation_config = model.generation_config
    common.ClearMetadataAndDocStringPass()(exported.program)  # the Python stack behind every node
    _name_axes(exported.program)
    return exported


def _name_axes(program: Any) -> None:
    """Call the dynamic axes `batch`, `past`, `length`, `total` and `kept` where torch calls them `s70`."""
    import onnx_ir

    axes = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "total"), "logits_to_keep": ("kept",)}
    names: dict[str, str] = {}
    for value in program.graph.inputs:
        for dim, name in zip(value.shape, axes.get(value.name, ("batch", "", "past", "")), strict=False):
            if not isinstance(dim, int) and name:
                names.setdefault(str(dim.value), name)
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    values = [*program.graph.inputs, *program.graph.initializers.values()]
    values += [output for node in program.graph.all_nodes() for output in node.outputs]
    for value in values:
        if value.shape is not None and not value.shape.is_static():
            named = [
                dim
                if isinstance(dim, int) or dim.value is None
                else symbol.sub(lambda found: names[found[0]], str(dim.value))
                for dim in value.shape
            ]
            value.shape = onnx_ir.Shape(named)


def _can_run(fusions: str) -> bool:
    import onnxruntime

    return DEFAULT_PROVIDERS[fusions] in onnxruntime.get_available_providers()


def _difference(passes: list[Step], directory: Path, fusions: str) -> float:
    options = default_options()
    # Weights are read from the file as they are, not copied into the layout of the kernels: the trace is in memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return logit_difference(passes, OnnxCausalLM.open(directory, [DEFAULT_PROVIDERS[fusions]], session_options=options))
