"""transformers' `generate()` for an OpenVINO export."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, Cache, DynamicCache, GenerationConfig, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from exporters.graph_causal_lm import GraphCausalLM
from exporters.to_openvino import FORMAT
from exporters.writer import one_line, require
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.models.loading import resolve_directory

GRAPH = "openvino_model.xml"
OPENVINO_EXTRA = "openvino"


class StateLayer(DynamicLayer):
    """Placeholder for the keys and values in the runtime's state.

    Args:
        length: Number of tokens in the state.
        batch: Number of sequences.
    """

    def __init__(self, length: int, batch: int) -> None:
        DynamicLayer.__init__(self)
        self.length = length
        self.order = torch.arange(batch)

    def get_seq_length(self) -> int:
        """Number of tokens in the runtime's state."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Store the order of the sequences for the next step."""
        self.order = self.order[beam_idx]

    def crop(self, tokens_to_remove: int) -> None:
        """Raise an error: the runtime cannot remove a part of its state.

        Args:
            tokens_to_remove: Number of tokens to remove.

        Raises:
            UserError: Always.
        """
        raise UserError("OpenVINO's state cannot be cropped.", "Begin the sequence anew.")


@functools.cache
def _core() -> Any:
    """Return the only core of this process.

    The CPU device of OpenVINO (2026.4) puts a signal stack of its own in place of the thread's. Of two cores, the
    second puts back that of the first, which may be freed by then: the next signal, such as an interrupt, would end
    the process without a word.
    """
    import openvino

    return openvino.Core()


class OpenVinoCausalLM(GraphCausalLM):
    """A causal language model in OpenVINO. The runtime's state is its KV cache, and holds one batch at a time.

    Args:
        compiled: OpenVINO model, compiled for a device.
        config: Configuration of the exported model.
        generation_config: Defaults of `generate()`.
    """

    def __init__(
        self, compiled: Any, config: PreTrainedConfig, generation_config: GenerationConfig | None = None
    ) -> None:
        super().__init__(config, generation_config)
        self._request = compiled.create_infer_request()
        self._logits = compiled.output("logits")
        self._state: StateLayer | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        device: str = "CPU",
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> OpenVinoCausalLM:
        """Load an export.

        Args:
            name: Directory that `selfpruner export --to openvino` wrote, or Hub repository.
            device: Device as OpenVINO names it: `"CPU"`, `"GPU"`, …
            threads: Number of CPU threads; None takes PyTorch's number.
            settings: Further properties of OpenVINO, such as `{"INFERENCE_PRECISION_HINT": "bf16"}`; arithmetic is
                float32 by default.
            subfolder: Folder of the export in the directory or repository.
            **kwargs: Options of a Hub repository: `revision`, `token`, `cache_dir` and `local_files_only`.

        Returns:
            The model, ready to run.

        Raises:
            MissingExtraError: OpenVINO is not installed.
            UserError: The device is not available.
            SavedModelError: There is no OpenVINO export, or it is damaged.
        """
        require("openvino", OPENVINO_EXTRA)
        directory = resolve_directory(str(name), subfolder, **kwargs)
        FORMAT.read(directory)
        return cls.open(directory, device, threads, settings)

    @classmethod
    def open(
        cls,
        directory: Path,
        device: str = "CPU",
        threads: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> OpenVinoCausalLM:
        """Load the files of an export; see `from_pretrained`.

        Args:
            directory: Directory of the files.
            device: Device as OpenVINO names it.
            threads: Number of CPU threads; None takes PyTorch's number.
            settings: Further properties of OpenVINO.

        Returns:
            The model, ready to run.

        Raises:
            UserError: The device is not available.
            SavedModelError: The files are damaged.
        """
        core = _core()
        if device.split(".")[0] not in {name.split(".")[0] for name in core.available_devices}:
            raise UserError(f"OpenVINO has no device {device!r} here.", f"It has {', '.join(core.available_devices)}.")
        properties: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if device == "CPU":
            properties["INFERENCE_NUM_THREADS"] = threads or torch.get_num_threads()
        properties |= settings or {}
        try:
            compiled = core.compile_model(core.read_model(directory / GRAPH), device, properties)
            config, generation = AutoConfig.from_pretrained(directory), GenerationConfig.from_pretrained(directory)
        except Exception as error:  # OpenVINO raises RuntimeError for everything
            raise SavedModelError(
                f"The OpenVINO export in {str(directory)!r} cannot be loaded, it may be damaged or cut off: "
                f"{one_line(error)}",
                "Export or download the model again.",
            ) from error
        return cls(compiled, config, generation)

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the graph once; see `GraphCausalLM.step`.

        Args:
            input_ids: New tokens, `[B, S]`.
            attention_mask: Mask with ones for real tokens, `[B, P + S]`.
            position_ids: Positions of the new tokens, `[B, S]`.
            cache: Empty cache, or the cache that the last step returned.
            logits_to_keep: Indices of the positions that get logits, `[K]`.

        Returns:
            Logits `[B, K, V]`, and a cache with the `StateLayer` of the runtime's state.

        Raises:
            UserError: The runtime's state belongs to another batch by now.
        """
        batch, past = len(input_ids), cache.get_seq_length()
        order = torch.arange(batch)
        if not past:
            self._request.reset_state()
        elif self._state is None or cache.layers[0] is not self._state:
            raise UserError(
                "OpenVINO holds the state of one batch, and it is of another one by now.",
                "Finish a batch before the next one, or load the model twice.",
            )
        else:
            order = self._state.order
        feed = {
            "input_ids": input_ids.numpy(),
            "attention_mask": attention_mask.numpy(),
            "position_ids": position_ids.contiguous().numpy(),
            "beam_idx": order.numpy().astype(np.int32),
        }
        logits = torch.from_numpy(self._request.infer(feed)[self._logits])
        self._state = StateLayer(past + input_ids.shape[1], batch)
        after = DynamicCache()
        after.layers.append(self._state)
        return logits[:, logits_to_keep], after
