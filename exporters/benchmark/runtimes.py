"""The runtimes that a model can be timed in: how each loads it, and how it runs a pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from exporters.benchmark.latency import CausalLMRunner, Measured, Runner
from exporters.to_gguf.llama_cpp import LlamaCpp
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.storage.export_record import read_export


@dataclass(frozen=True)
class Setting:
    """How a model is loaded; what does not concern a runtime it ignores."""

    threads: int
    device: str
    dtype: str
    """Of the weights, in the runtime's words; an export that is there already has its own."""
    longest: int
    """Tokens of the longest sequence that will be run."""
    batch: int = 1
    """The most prompts at a time."""
    loading: dict[str, Any] = field(default_factory=dict)
    """Other keywords of transformers' `from_pretrained`."""


class LlamaCppRunner:
    """llama.cpp, by its own clock: what its server spends on requests and text is left out.

    Args:
        model: The loaded file.
    """

    def __init__(self, model: LlamaCpp) -> None:
        self.model = model

    def measure(self, ids: Tensor, new_tokens: int) -> Measured:
        """Time a pass; `Runner` says of what."""
        # The first token comes with the prompt: `predicted_ms` is the time of the others.
        timings = self.model.complete(ids[0].tolist(), new_tokens + 1, ignore_eos=True)["timings"]
        return Measured(timings["prompt_ms"], timings["predicted_ms"] / new_tokens)


def _torch(name: str, setting: Setting) -> Runner:
    model, _ = load_model(name, dtype=setting.dtype, **setting.loading)
    model.to(setting.device)  # type: ignore[arg-type]
    return CausalLMRunner(model, setting.device)


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
    path = Path(name) / f"model-{record.options['dtype']}.gguf"
    return LlamaCppRunner(LlamaCpp(path, setting.longest, setting.threads))


@dataclass(frozen=True)
class Runtime:
    """A row of the table of runtimes."""

    load: Callable[[str, Setting], Runner]
    dtypes: dict[str, tuple[float, float]]
    """Bytes of a weight, and of an element of the cache, for each dtype; the first is the default."""
    options: Callable[[Setting], dict[str, Any]] | None = lambda setting: {"dtype": setting.dtype}
    """Of the exports to the format of its name, which it runs; None: it runs PyTorch's own files."""
    device: str = "cpu"
    """Where it runs unless a device is named."""
    batched: bool = True
    """It runs several prompts at a time."""


# int8: blocks of 32 bytes with a float32 scale; q8_0: with a float16 scale. llama.cpp's cache is float16 whatever the
# weights are.
RUNTIMES: dict[str, Runtime] = {
    "torch": Runtime(_torch, {"float32": (4, 4), "bfloat16": (2, 2), "float16": (2, 2)}, options=None),
    "onnx": Runtime(_onnx, {"float32": (4, 4), "float16": (2, 2), "int8": (36 / 32, 4)}, _onnx_options),
    "tensorrt": Runtime(
        _tensorrt, {"float16": (2, 2), "float32": (4, 4), "bfloat16": (2, 2)}, _tensorrt_options, device="cuda"
    ),
    "openvino": Runtime(_openvino, {"float32": (4, 4), "float16": (2, 4)}),
    "gguf": Runtime(_gguf, {"f16": (2, 2), "f32": (4, 2), "q8_0": (34 / 32, 2)}, batched=False),
}
