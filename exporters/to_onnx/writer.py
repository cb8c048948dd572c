"""Export to ONNX by transformers' exporter: one graph with a KV cache, for prefill and decode."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import re
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import Step, expected, kl_divergence, logit_difference, own_text
from exporters.to_onnx import hub_layout
from exporters.to_onnx.attention_operator import OPSET, attending_by_operator
from exporters.to_onnx.causal_lm import DEFAULT_PROVIDERS, OnnxCausalLM, default_options
from exporters.to_onnx.hub_layout import BITS
from exporters.to_onnx.matrix_bits import quantize, rounded
from exporters.tracing import decode_step, tracing
from exporters.writer import Written, one_line, one_of, require
from selfpruner_hub.errors import ExportError, UserError
from selfpruner_hub.models.weights import converted

ONNX_TOLERANCES = {"float32": 1e-3, "float16": 0.1, "int8": 0.1, "int4": 0.1}
"""Largest allowed distance from PyTorch in float32, by dtype: of a logit; for int8 and int4 the KL divergence in nats
from the PyTorch model with rounded matrices, on text that the model writes, to allow for kernels that round activations
to 8 bits."""
ONNX_DTYPES = ("float32", "float16", "int8")
LAYOUTS = ("transformers", "hub")
FUSIONS = tuple(DEFAULT_PROVIDERS)
_ORT_FUSIONS: dict[str, Literal["cpu", "cuda"] | None] = {"cpu": "cpu", "cuda": "cuda", "none": None}
ONNX_EXTRA, ONNX_LIBRARIES = "onnx", ("onnx", "onnxscript", "onnxruntime")
HUB_REMARK = "ONNX Runtime GenAI and Transformers.js load this directory; OnnxCausalLM does not."


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    dtype: str = "float32",
    fusions: str = "cpu",
    layout: str = "transformers",
) -> Written:
    """Write `model.onnx`, a file of its weights, and the configuration; compare its logits with PyTorch's.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Unused.
        staging: Directory of the files.
        dtype: Dtype of the weights: `"float32"`, `"float16"`, or `"int8"` (matrix products only, the rest float32).
        fusions: Provider of ONNX Runtime, `"cpu"` or `"cuda"`, whose special operators the graph is fused into;
            `"none"` leaves a plain graph for TensorRT and other runtimes.
        layout: Names and files: `"transformers"`, those of transformers' exporter, for `OnnxCausalLM`; or `"hub"`,
            those of ONNX Runtime GenAI and Transformers.js, with a graph in every dtype.

    Returns:
        Report of what was written.

    Raises:
        UserError: An option is unknown, or a library is missing.
        ExportError: The model cannot be traced.
    """
    one_of("dtype", dtype, ONNX_DTYPES)
    one_of("fusions", fusions, FUSIONS)
    if one_of("layout", layout, LAYOUTS) == "hub" and (dtype, fusions) != ("float32", "cpu"):
        raise UserError("The layout hub has a graph in every dtype, fused for CPUs.", "Leave out dtype and fusions.")
    for library in ONNX_LIBRARIES:
        require(library, ONNX_EXTRA)
    options = {"dtype": dtype, "fusions": fusions, "layout": layout}
    libraries = ("onnx", "onnxscript", importlib.metadata.packages_distributions()["onnxruntime"][0])
    if layout == "hub":
        _write_hub_layout(model, staging)
        passes, remark = expected_by_dtype(model)
        run = partial(hub_layout.graphs_difference, passes, staging, model.config, ONNX_TOLERANCES, default_options())
        return Written(options, libraries, ONNX_TOLERANCES["float32"], lambda: run, remark=f"{HUB_REMARK} {remark}")
    in_bits = dtype in BITS
    exported = trace(converted(model, torch.float16) if dtype == "float16" else model, fusions)
    if in_bits:
        component = exported.components["model"]
        component.program = quantize(component.program)
    exported.save_pretrained(staging)
    del exported
    gc.collect()  # frees the graphs' reference cycles before the runtime loads the weights
    runnable = _can_run(fusions)
    passes, remark = expected_by_dtype(model, [dtype])
    return Written(
        options=options,
        libraries=libraries,
        tolerance=ONNX_TOLERANCES[dtype],
        compare=(lambda: partial(_difference, passes[dtype], staging, fusions, in_bits)) if runnable else None,
        compared="KL divergence" if in_bits else "logit",
        unchecked="" if runnable else f"this onnxruntime has no {DEFAULT_PROVIDERS[fusions]}",
        remark=remark,
    )


def write_graph(model: PreTrainedModel, directory: Path) -> hub_layout.HubGraph:
    """Write the float32 graph of a model in the layout hub, without comparing its logits with PyTorch's, and open it.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        directory: Directory of the graph.

    Returns:
        The graph, with `generate()`.

    Raises:
        MissingExtraError: A library is not installed.
        ExportError: The model cannot be traced.
    """
    for library in ONNX_LIBRARIES:
        require(library, ONNX_EXTRA)
    hub_layout.save_hub_graph(trace(model, "cpu", last=True).program, directory, "float32")
    path = directory / hub_layout.file_of("float32")
    return hub_layout.HubGraph(path, model.config, default_options(), model.generation_config)


def expected_by_dtype(
    model: PreTrainedModel, dtypes: Collection[str] = tuple(ONNX_TOLERANCES)
) -> tuple[dict[str, list[Step]], str]:
    """Record what graphs should compute.

    Args:
        model: Model in float32.
        dtypes: Dtypes of the graphs, keys of `ONNX_TOLERANCES`.

    Returns:
        Forward passes in PyTorch by dtype; for 8 and 4 bits, of the model with rounded matrices on text of its own. And
        a sentence that says how far that one is from the model itself; empty for other dtypes.
    """
    passes = dict.fromkeys(dtypes, expected(model))
    if not (in_bits := [dtype for dtype in dtypes if dtype in BITS]):
        return passes, ""
    text, losses = own_text(model), []
    on_text = expected(model, text=text)
    for dtype in in_bits:
        of_bits = rounded(model, BITS[dtype])
        passes[dtype] = expected(of_bits, text=text)
        losses.append(f"{kl_divergence(on_text, of_bits):.2g} nats in {BITS[dtype]} bits")
    return passes, f"Rounding alone moves the model, by the KL divergence on text of its own, {', '.join(losses)}."


def _write_hub_layout(model: PreTrainedModel, staging: Path) -> None:
    hub_layout.save_hub_graph(trace(model, "cpu", last=True).program, staging, "float32")
    hub_layout.save_quantized(staging)
    half = converted(model, torch.float16)
    hub_layout.save_hub_graph(trace(half, "cpu", last=True).program, staging, "float16")
    hub_layout.save_configurations(model, staging)
    gc.collect()


def trace(model: PreTrainedModel, fusions: str, last: bool = False) -> Any:
    """Trace the decode graph of a model.

    Args:
        model: Model in the dtype of the graph.
        fusions: Target of the fusions, one of `FUSIONS`.
        last: Flag for a graph that returns logits of the last position alone.

    Returns:
        transformers' `ExportedModel`; its `.program` is the graph, an `onnx_ir.Model` that shares the model's weights.

    Raises:
        ExportError: torch or the exporter could not trace it.
    """
    from onnx_ir.passes import common
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    inputs, shapes = decode_step(model, last)
    # On a GPU, ONNX Runtime fuses transformers' attention into its own operators; TensorRT fuses by itself.
    attending, opset = (attending_by_operator(model), OPSET) if fusions == "cpu" else (contextlib.nullcontext(), None)
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, ort_fusions=_ORT_FUSIONS[fusions], opset_version=opset)
    try:
        with tracing(model), attending:
            exported = OnnxExporter().export(model, inputs, config)
    except Exception as error:  # torch.export, torch.onnx and the exporters share no base class
        raise ExportError(f"{type(model).__name__} cannot be traced to ONNX: {one_line(error)}") from error
    exported.generation_config = model.generation_config
    common.ClearMetadataAndDocStringPass()(exported.program)  # removes every node's Python stack trace
    _name_axes(exported.program)
    return exported


def _name_axes(program: Any) -> None:
    """Rename the dynamic axes from torch's names, such as `s70`, to `batch`, `past`, `length`, `total` and `kept`."""
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
            dimensions = [
                dim
                if isinstance(dim, int) or dim.value is None
                else symbol.sub(lambda match: names[match[0]], str(dim.value))
                for dim in value.shape
            ]
            value.shape = onnx_ir.Shape(dimensions)


def _can_run(fusions: str) -> bool:
    import onnxruntime

    return DEFAULT_PROVIDERS[fusions] in onnxruntime.get_available_providers()


def _difference(passes: list[Step], directory: Path, fusions: str, in_bits: bool) -> float:
    # Without prepacked weights, ONNX Runtime runs other kernels for 8 bits than those that users get.
    options = default_options() if in_bits else _frugal_options()
    graph = OnnxCausalLM.open(directory, [DEFAULT_PROVIDERS[fusions]], session_options=options)
    return (kl_divergence if in_bits else logit_difference)(passes, graph)


def _frugal_options() -> Any:
    options = default_options()
    # Saves memory: weights are read from the file without a copy in the kernels' layout. The trace is still in memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return options
