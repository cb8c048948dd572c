"""transformers' `generate()` for a TensorRT export, with decode steps as CUDA graphs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Cache, GenerationConfig, PreTrainedConfig

from exporters.graph_causal_lm import GraphCausalLM
from exporters.to_tensorrt import FORMAT
from exporters.to_tensorrt.cuda_graphs import FixedWindow, layer_names
from exporters.to_tensorrt.engine import TensorRTEngine
from exporters.to_tensorrt.library import find_library, gpu_here
from exporters.tracing import cache_of, states_of
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.models.loading import resolve_directory
from selfpruner_hub.storage.export_record import ExportRecord

ENGINE = "model.engine"
PREFILL, DECODE = 0, 1
"""Indices of an engine's profiles."""


class TensorRtCausalLM(GraphCausalLM):
    """A causal language model in TensorRT, on an NVIDIA GPU.

    Args:
        engine: Engine with the interface of `TensorRTEngine`.
        config: Configuration of the exported model.
        context: Largest number of tokens of a sequence.
        dtype: Dtype of keys and values.
        generation_config: Defaults of `generate()`.
        graphs: Flag to capture decode steps as CUDA graphs.
    """

    def __init__(
        self,
        engine: Any,
        config: PreTrainedConfig,
        context: int,
        dtype: torch.dtype,
        generation_config: GenerationConfig | None = None,
        *,
        graphs: bool = True,
    ) -> None:
        super().__init__(config, generation_config)
        self._engine, self._context, self._dtype, self._graphs = engine, context, dtype, graphs
        self._window: FixedWindow | None = None

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, graphs: bool = True, subfolder: str = "", **kwargs: Any
    ) -> TensorRtCausalLM:
        """Load an export.

        Args:
            name: Directory that `selfpruner export --to tensorrt` wrote, or Hub repository.
            graphs: Flag to capture decode steps as CUDA graphs.
            subfolder: Folder of the export in the directory or repository.
            **kwargs: Options of a Hub repository: `revision`, `token`, `cache_dir` and `local_files_only`.

        Returns:
            The model, ready to run.

        Raises:
            SavedModelError: There is no such export, it is damaged, or it is for another GPU or version of TensorRT.
            UserError: There is no NVIDIA GPU, or the library is missing.
        """
        directory = resolve_directory(str(name), subfolder, **kwargs)
        record = FORMAT.read(directory)
        serialised = read_engine(directory, record)
        check_fits(record)
        return cls.load(directory, record.options, serialised, graphs=graphs)

    @classmethod
    def load(
        cls, directory: Path, options: Mapping[str, Any], serialised: bytes, *, graphs: bool = True
    ) -> TensorRtCausalLM:
        """Load an engine that was built for this GPU and TensorRT version.

        Args:
            directory: Directory with the model's configuration.
            options: Options of the export, from its record.
            serialised: Content of the engine's file.
            graphs: Flag to capture decode steps as CUDA graphs.

        Returns:
            The model, ready to run.

        Raises:
            SavedModelError: TensorRT cannot load the engine.
        """
        engine = TensorRTEngine(find_library(options["library"]), serialised)
        generation = GenerationConfig.from_pretrained(directory)
        dtype = getattr(torch, options["dtype"])
        config = AutoConfig.from_pretrained(directory)
        return cls(engine, config, options["context"], dtype, generation, graphs=graphs)

    @property
    def device(self) -> torch.device:
        """Device of the inputs and outputs."""
        return torch.device(self._engine.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._dtype

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the engine once; see `GraphCausalLM.step`.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Mask with ones for real tokens, `[B, P + S]`.
            position_ids: Positions of the new tokens, `[B, S]`.
            cache: Keys and values of the P tokens before them.
            logits_to_keep: Indices of the positions that get logits, `[K]`.

        Returns:
            Logits `[B, K, V]`, and the cache of all P + S tokens. After a decode step it is valid until the next one.

        Raises:
            UserError: The sequence is longer than the engine's context.
        """
        past, length = cache.get_seq_length(), input_ids.shape[1]
        if past + length > self._context:
            raise UserError(
                f"{past + length} tokens are more than the {self._context} that this engine takes.",
                "Export the model with a larger context.",
            )
        if length == 1 and 0 < past < self._context - 1:
            if self._window is None or not self._window.serves(cache):
                self._window = None  # free its buffers before allocating new ones
                self._window = FixedWindow(self._decode, cache, self._context - 1, self._capture())
            return self._window.step(input_ids, attention_mask, position_ids)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "logits_to_keep": logits_to_keep,
            **dict(zip(layer_names("input", len(cache.layers)), states_of(cache), strict=True)),
        }
        placed = {name: tensor.to(self.device).contiguous() for name, tensor in inputs.items()}
        outputs = self._engine.run(PREFILL, placed)
        return outputs["logits"], cache_of([outputs[name] for name in layer_names("output", len(cache.layers))])

    def _decode(self, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor] | None) -> dict[str, Tensor]:
        run: dict[str, Tensor] = self._engine.run(DECODE, inputs, outputs)
        return run

    def _capture(self) -> Callable[[Callable[[], None]], Callable[[], object]] | None:
        return capture if self._graphs and self._engine.capturable(DECODE) else None


def capture(function: Callable[[], None]) -> Callable[[], object]:
    """Capture the GPU work of a function as a CUDA graph, and return the function that replays it."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        function()
    replay: Callable[[], object] = graph.replay
    return replay


def read_engine(directory: Path, record: ExportRecord) -> bytes:
    """Read an engine, and check its SHA-256 against the record.

    Args:
        directory: Directory of `model.engine`.
        record: Record of the export.

    Returns:
        The serialised engine.

    Raises:
        SavedModelError: The engine is missing, cut off, or a different one.
    """
    path = directory / ENGINE
    try:
        serialised = path.read_bytes()
    except OSError as error:
        raise SavedModelError(f"{str(path)!r} cannot be read: {error.strerror}.", "Export the model again.") from error
    if hashlib.sha256(serialised).hexdigest() != record.options["sha256"]:
        raise SavedModelError(
            f"{str(path)!r} is not the engine that its record tells of: damaged, cut off, or replaced.",
            "Export or download the model again.",
        )
    return serialised


def check_fits(record: ExportRecord) -> None:
    """Refuse an engine that was built for another GPU or by another version of TensorRT.

    Args:
        record: Record of the export.

    Raises:
        SavedModelError: The engine is for another GPU or TensorRT version.
        UserError: There is no NVIDIA GPU here, or TensorRT is missing.
    """
    target, here = record.options["compute_capability"], gpu_here()
    if here is None:
        raise UserError(
            f"PyTorch sees no NVIDIA GPU here; the engine is for compute capability {target}.",
            "Run it where there is one, with a PyTorch that has CUDA.",
        )
    if here[0] != target:
        raise SavedModelError(
            f"The engine is for compute capability {target}; this GPU ({here[1]}) has {here[0]}.",
            f"Export the model again with --compute-capability {here[0]}.",
        )
    library = find_library(record.options["library"])
    built, installed = record.versions[library.distribution], library.module.__version__
    if built != installed:
        raise SavedModelError(
            f"The engine was built by {library.name} {built}; {installed} is installed.",
            "Export the model again, or install that version.",
        )
