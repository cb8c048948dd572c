"""Export to TensorRT: an engine with profiles for prefill and decode, built from the plain ONNX graph."""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from exporters.parity import DECODE_STEPS, Step, expected, logit_difference
from exporters.to_onnx.writer import trace
from exporters.to_tensorrt.causal_lm import ENGINE, TensorRtCausalLM
from exporters.to_tensorrt.library import Library, find_library, gpu_here, parse_capability
from exporters.to_tensorrt.profiles import Profile, profiles
from exporters.writer import Written, one_line, one_of, require
from selfpruner_hub.errors import ExportError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.weights import converted

TENSORRT_DTYPES = {"float32": (torch.float32, 0.05), "float16": (torch.float16, 0.2), "bfloat16": (torch.bfloat16, 1.5)}
"""Dtype of the strongly typed network (float32 may use TF32), and largest allowed distance of a logit to PyTorch's."""


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    dtype: str = "float16",
    compute_capability: str | float | None = None,
    batch: int = 1,
    context: int = 2048,
) -> Written:
    """Build `model.engine`; compare its logits with PyTorch's if this machine has the GPU that it is for.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Unused.
        staging: Directory of the files.
        dtype: Dtype of weights and arithmetic: `"float32"`, `"float16"` or `"bfloat16"`.
        compute_capability: Compute capability of the target GPU, such as `"8.6"`; None takes this machine's GPU. A GPU
            that is not here needs TensorRT-RTX, which builds without one.
        batch: Largest number of sequences at a time, at least 1.
        context: Largest number of tokens of a sequence, at least 2.

    Returns:
        Report of what was written.

    Raises:
        UserError: An option is wrong, there is no GPU and none is named, or a library is missing.
        ExportError: The model cannot be traced, or TensorRT cannot build the engine.
    """
    kind, tolerance = TENSORRT_DTYPES[one_of("dtype", dtype, tuple(TENSORRT_DTYPES))]
    prepared = profiles(batch, context)
    target, gpu = _target(compute_capability)
    for needed in ("onnx", "onnxscript"):
        require(needed, "onnx")
    library = find_library(elsewhere=gpu is None)
    if gpu is None:
        one_of("compute capability", target, tuple(library.capabilities))
    with tempfile.TemporaryDirectory(dir=staging.parent) as scratch:
        graph = Path(scratch) / "model.onnx"
        save_plain_graph(model, kind, graph)
        engine = build_engine(library, graph, model.config, prepared, target if gpu is None else None)
    (staging / ENGINE).write_bytes(engine)
    model.config.save_pretrained(staging)
    options = {
        "dtype": dtype,
        "compute_capability": target,
        "gpu": gpu,
        "batch": batch,
        "context": context,
        "library": library.name,
        "profiles": [asdict(profile) for profile in prepared],
        "sha256": hashlib.sha256(engine).hexdigest(),
    }
    longest = min(24, context - DECODE_STEPS)
    prompts = [max(1, longest // part) for part in (1, 3, 24)][:batch]
    return Written(
        options=options,
        libraries=("onnx", "onnxscript", library.distribution),
        tolerance=tolerance,
        compare=None
        if gpu is None
        else lambda: partial(_difference, expected(model, prompts), staging, options, engine),
        unchecked="" if gpu else f"the engine was not run: no GPU of compute capability {target} is here",
    )


def _target(capability: str | float | None) -> tuple[str, str | None]:
    """The compute capability to build for, and the name of this machine's GPU if it has that capability."""
    here = gpu_here()
    if capability is None:
        if here is None:
            raise UserError(
                "PyTorch sees no NVIDIA GPU here to build an engine for.",
                "Name its compute capability, such as 8.6 (--compute-capability 8.6).",
            )
        return here
    target = parse_capability(capability)
    return target, here[1] if here is not None and here[0] == target else None


def save_plain_graph(model: PreTrainedModel, dtype: torch.dtype, path: Path) -> None:
    """Write the plain ONNX graph of a model.

    Args:
        model: Model to trace; it is not changed.
        dtype: Dtype of the graph's weights and arithmetic.
        path: Path of the graph's file; the weights go into the same directory.
    """
    import onnx_ir

    typed = model if dtype == model.dtype else converted(model, dtype)
    onnx_ir.save(trace(typed, "none").program, str(path), external_data=f"{path.name}.data")


def build_engine(
    library: Library, graph: Path, config: PreTrainedConfig, prepared: tuple[Profile, ...], target: str | None
) -> bytes:
    """Build an engine from an ONNX graph.

    Args:
        library: TensorRT library.
        graph: Path of the ONNX file.
        config: Configuration of the model.
        prepared: Profiles of the engine.
        target: Compute capability of a GPU that is not here; None builds for this machine's GPU.

    Returns:
        The serialised engine.

    Raises:
        ExportError: TensorRT cannot parse the graph or build the engine.
    """
    trt = library.module
    builder = trt.Builder(library.log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.log)
    if not parser.parse_from_file(str(graph)):
        raise ExportError(f"TensorRT cannot read the graph: {one_line(parser.get_error(0).desc())}")
    settings = builder.create_builder_config()
    if target is not None:
        settings.num_compute_capabilities = 1
        settings.set_compute_capability(library.capabilities[target], 0)
    for profile in prepared:
        shapes = profile.input_shapes(shape_of(config))
        sizes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            name = network.get_input(index).name
            sizes.set_shape(name, *shapes[name])
        settings.add_optimization_profile(sizes)
    engine = builder.build_serialized_network(network, settings)
    if engine is None:
        raise ExportError(f"TensorRT cannot build the engine: {one_line(library.log.last_error)}")
    return bytes(engine)


def _difference(passes: list[Step], directory: Path, options: dict[str, Any], engine: bytes) -> float:
    return logit_difference(passes, TensorRtCausalLM.load(directory, options, engine))
