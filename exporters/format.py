"""The runtimes that a benchmark can use: how each loads a model and runs a pass."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES
from torch import Tensor

from exporters.benchmark.latency import CausalLMRunner, Measured, Runner
from exporters.to_gguf.dtypes import DTYPES
from exporters.to_gguf.library import cross_entropy
from exporters.to_gguf.llama_cpp import LlamaCpp
from exporters.to_onnx.hub_layout import file_of
from exporters.vllm.other_python import VLLM_WORKER, versions
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.export_record import read_export


@dataclass(frozen=True)
class Setting:
    """Settings for loading a model; a runtime ignores those that it has no use for."""

    threads: int
    device: str
    dtype: str
    """Dtype of the weights, as the runtime names it; an existing export keeps its own."""
    longest: int
    """Length of the longest sequence that will be run, in tokens."""
    batch: int = 1
    """Largest batch size."""
    loading: dict[str, Any] = field(default_factory=dict)
    """Other keyword arguments of transformers' `from_pretrained`."""
    python: str = ""
    """Path of the Python that runs the runtime, if it is not this one."""
    staged: bool = False
    """Whether the model's directory was made by `other_python.staged`, so that code in it may run."""
    models: int = 1
    """Number of models that are loaded at a time, for a runtime that reserves memory of a GPU."""


class LlamaCppRunner:
    """llama.cpp with its own timings, which leave out the server's time for requests and text.

    Args:
        path: Path of the GGUF file.
        setting: Length of the longest sequence, and number of threads.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.model = LlamaCpp(path, setting.longest, setting.threads)
        self._path, self._threads = path, setting.threads

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `Runner.measure`."""
        # `prompt_ms` includes the first new token; `predicted_ms` is the time of the others.
        timings = self.model.complete(ids[0].tolist(), new_tokens + 1, ignore_eos=True)["timings"]
        return Measured(timings["prompt_ms"], timings["predicted_ms"] / new_tokens)

    def cross_entropy(self, windows: Tensor) -> float:
        """Measure the loss on text; see `Runner.cross_entropy`."""
        return cross_entropy(self._path, windows, self._threads)


class GenaiRunner:
    """ONNX Runtime GenAI, which owns the KV cache.

    Args:
        directory: Directory of an export to ONNX with the layout `hub`.
        setting: Dtype of the graph, and number of threads.

    Raises:
        UserError: onnxruntime-genai is not installed.
        SavedModelError: The directory holds another export.
    """

    def __init__(self, directory: Path, setting: Setting) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise UserError(
                "onnxruntime-genai is not installed.", "Install it with: pip install onnxruntime-genai"
            ) from error
        if not read_export(directory, "onnx").has_hub_layout:
            raise SavedModelError(f"{str(directory)!r} is not for GenAI.", "Export the model with --layout hub.")
        config = onnxruntime_genai.Config(str(directory))
        session = {"intra_op_num_threads": setting.threads}
        config.overlay(
            json.dumps({"model": {"decoder": {"filename": file_of(setting.dtype), "session_options": session}}})
        )
        self._library, self._model = onnxruntime_genai, onnxruntime_genai.Model(config)

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; see `Runner.measure`."""
        length = ids.shape[1] + new_tokens + 1
        parameters = self._library.GeneratorParams(self._model)
        parameters.set_search_options(batch_size=len(ids), max_length=length, min_length=length)
        generator = self._library.Generator(self._model, parameters)
        start = time.perf_counter()
        generator.append_tokens(ids.numpy().astype("int32"))
        generator.generate_next_token()
        read = time.perf_counter()
        for _ in range(new_tokens):
            generator.generate_next_token()
        return Measured(1000 * (read - start), 1000 * (time.perf_counter() - read) / new_tokens)

    def cross_entropy(self, windows: Tensor) -> float:
        """Refuse: these graphs compute the logits of the last position alone."""
        raise UserError("genai is timed here, not scored on text.", "Leave out the text.")


def _torch(name: str, setting: Setting) -> Runner:
    device = None if "device_map" in setting.loading else setting.device
    model, _ = load_model(name, dtype=setting.dtype, device=device, **setting.loading)
    return CausalLMRunner(model, model.device)


def _onnx(name: str, setting: Setting) -> Runner:
    from exporters.to_onnx.causal_lm import DEFAULT_PROVIDERS, OnnxCausalLM

    model = OnnxCausalLM.from_pretrained(
        name, providers=[DEFAULT_PROVIDERS[_onnx_options(setting)["fusions"]]], threads=setting.threads
    )
    return CausalLMRunner(model, model.device)


def _onnx_options(setting: Setting) -> dict[str, Any]:
    return {"dtype": setting.dtype, "fusions": "cuda" if setting.device.startswith("cuda") else "cpu"}


def _tensorrt(name: str, setting: Setting) -> Runner:
    from exporters.to_tensorrt.causal_lm import TensorRtCausalLM

    model = TensorRtCausalLM.from_pretrained(name)
    return CausalLMRunner(model, model.device)


def _tensorrt_options(setting: Setting) -> dict[str, Any]:
    return {"dtype": setting.dtype, "batch": setting.batch, "context": setting.longest}


def _openvino(name: str, setting: Setting) -> Runner:
    from exporters.to_openvino.causal_lm import OpenVinoCausalLM

    return CausalLMRunner(OpenVinoCausalLM.from_pretrained(name, threads=setting.threads))


def _gguf(name: str, setting: Setting) -> Runner:
    record = read_export(Path(name), "gguf")
    return LlamaCppRunner(Path(name) / f"model-{record.options['dtype']}.gguf", setting)


def _genai(name: str, setting: Setting) -> Runner:
    return GenaiRunner(Path(name), setting)


@dataclass(frozen=True)
class Runtime:
    """A runtime: how it loads a model, and what it can run."""

    load: Callable[[str, Setting], Runner] | None
    """None for a runtime that runs in another Python."""
    dtypes: dict[str, tuple[float, float]]
    """Bytes of a weight and of a KV-cache element, by dtype; the first dtype is the default."""
    options: Callable[[Setting], dict[str, Any]] | None = lambda setting: {"dtype": setting.dtype}
    """Options of an export; None for a runtime that loads PyTorch's files."""
    format: str = ""
    """Format of the exports; empty for that of the runtime's name."""
    device: str = "cpu"
    """Default device."""
    on_gpu: bool = False
    """Whether a target is measured on the CUDA device of a model that is on one."""
    batched: bool = True
    """Whether it can run several prompts at a time."""
    batches: tuple[int, ...] = (1,)
    """Default batch sizes."""
    scored: bool = True
    """Whether it can measure the perplexity of text."""
    program: Path | None = None
    """Script that answers the requests of a `Worker` in another Python."""


_GGUF_DTYPES = ("f16", *(name for name in DTYPES if name != "f16"))


def _bytes(dtype: str) -> float:
    block, size = GGML_QUANT_SIZES[DTYPES[dtype].tensor]
    return size / block


# int8 and int4 have a float32 scale for each block of 32 weights, q8_0 a float16 scale. llama.cpp's KV cache is always
# float16. The bits of K-quants, and of int4, are those of most matrices; a file also has finer ones, and others where
# 256 divides no row.
RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime(_torch, {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)}, options=None, on_gpu=True),
    "onnx": Runtime(_onnx, {"float32": (4, 4), "float16": (2, 2), "int8": (36 / 32, 4)}, _onnx_options, on_gpu=True),
    "genai": Runtime(
        _genai,
        {"float32": (4, 4), "float16": (2, 2), "int8": (36 / 32, 4), "int4": (20 / 32, 4)},
        lambda setting: {"layout": "hub"},
        format="onnx",
        scored=False,
    ),
    "tensorrt": Runtime(
        _tensorrt, {"float16": (2, 2), "float32": (4, 4), "bfloat16": (2, 2)}, _tensorrt_options, device="cuda"
    ),
    "openvino": Runtime(_openvino, {"float32": (4, 4), "float16": (2, 4)}),
    "gguf": Runtime(_gguf, {name: (_bytes(name), 2) for name in _GGUF_DTYPES}, batched=False),
    "vllm": Runtime(
        None,
        {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)},
        options=None,
        on_gpu=True,
        batches=(1, 8, 32),
        scored=False,
        program=VLLM_WORKER,
    ),
}


def versions_elsewhere(runtime: str, python: str | Path | None) -> dict[str, str]:
    """Read the versions of the other Python of a runtime, if it has one.

    Args:
        runtime: Key of `RUNTIMES`.
        python: Path of the Python of a runtime that has an environment of its own, else None.

    Returns:
        Versions of the libraries there, by name; none for a runtime of this Python.

    Raises:
        UserError: The path is missing or not wanted, or the runtime is not there.
    """
    if RUNTIMES[runtime].program is not None:
        return versions(python)
    if python is not None:
        raise UserError(f"{runtime} runs in this Python.", "Leave --python out.")
    return {}
