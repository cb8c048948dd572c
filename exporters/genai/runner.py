"""ONNX Runtime GenAI, timed."""

from __future__ import annotations

import json
import time
from pathlib import Path

from torch import Tensor

from exporters.format import export_format
from exporters.runtime import Measured, Setting
from exporters.to_onnx.hub_layout import file_of
from selfpruner_hub.errors import SavedModelError, UserError


class GenaiRunner:
    """ONNX Runtime GenAI, which owns the KV cache.

    Args:
        name: Directory of an export to ONNX with the layout `hub`.
        setting: Dtype of the graph, and number of threads.

    Raises:
        UserError: onnxruntime-genai is not installed.
        SavedModelError: The directory holds another export.
    """

    def __init__(self, name: str, setting: Setting) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise UserError(
                "onnxruntime-genai is not installed.", "Install it with: pip install onnxruntime-genai"
            ) from error
        if not export_format("onnx").read(Path(name)).has_hub_layout:
            raise SavedModelError(f"{name!r} is not for GenAI.", "Export the model with --layout hub.")
        config = onnxruntime_genai.Config(name)
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
