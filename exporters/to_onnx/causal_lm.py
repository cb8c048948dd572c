"""transformers' `generate()` for an ONNX export, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig

from exporters.graph_causal_lm import GraphCausalLM
from exporters.to_onnx import FORMAT
from exporters.writer import one_line, require
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.models.loading import resolve_directory

Provider = str | tuple[str, dict[str, Any]]
"""Execution provider of ONNX Runtime, with its options if there are any."""
DEFAULT_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider", "none": "CPUExecutionProvider"}
"""Default execution provider, by the value of the export option `fusions`."""


class OnnxCausalLM(GraphCausalLM):
    """A causal language model in ONNX Runtime.

    Example:
        >>> model = OnnxCausalLM.from_pretrained("smollm2-b30-onnx")
        >>> ids = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8)

    Args:
        exported: Export by transformers' ONNX exporter, with an open session.
        config: Configuration of the exported model.
        generation_config: Defaults of `generate()`.
    """

    def __init__(
        self, exported: Any, config: PreTrainedConfig, generation_config: GenerationConfig | None = None
    ) -> None:
        super().__init__(config, generation_config)
        self._exported = exported

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        session_options: Any = None,
        subfolder: str = "",
        **kwargs: Any,
    ) -> OnnxCausalLM:
        """Load an export.

        Args:
            name: Directory that `selfpruner export --to onnx` wrote, or Hub repository.
            providers: Execution providers of ONNX Runtime in order of preference; all must be available. None takes
                the one that the graph was fused for.
            threads: Number of threads of the CPU provider; None takes PyTorch's number.
            session_options: Session options of ONNX Runtime; they replace `threads`.
            subfolder: Folder of the export in the directory or repository.
            **kwargs: Options of a Hub repository: `revision`, `token`, `cache_dir` and `local_files_only`.

        Returns:
            The model, ready to run.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            UserError: A provider is not available.
            SavedModelError: There is no ONNX export, or it is damaged.
        """
        require("onnxruntime", "onnx")
        directory = resolve_directory(str(name), subfolder, **kwargs)
        record = FORMAT.read(directory)
        if record.has_hub_layout:
            raise SavedModelError(
                f"{str(directory)!r} is for ONNX Runtime GenAI and Transformers.js (layout hub).",
                "Export the model without --layout hub.",
            )
        return cls.open(
            directory, list(providers or [DEFAULT_PROVIDERS[record.options["fusions"]]]), threads, session_options
        )

    @classmethod
    def open(
        cls, directory: Path, providers: Sequence[Provider], threads: int | None = None, session_options: Any = None
    ) -> OnnxCausalLM:
        """Load the files of an export; see `from_pretrained`.

        Args:
            directory: Directory of the files.
            providers: Execution providers of ONNX Runtime; all must be available.
            threads: Number of threads of the CPU provider; None takes PyTorch's number.
            session_options: Session options of ONNX Runtime; they replace `threads`.

        Returns:
            The model, ready to run.

        Raises:
            UserError: A provider is not available.
            SavedModelError: The files are damaged.
        """
        import onnxruntime
        from transformers.exporters.base import ExportedModel

        _check_providers(providers, onnxruntime.get_available_providers())
        if session_options is None:
            session_options = default_options(threads)
        try:
            exported = ExportedModel.from_pretrained(
                directory, providers=list(providers), session_options=session_options
            )
        except Exception as error:  # onnx, onnxruntime and transformers share no base class
            raise SavedModelError(
                f"The ONNX export in {str(directory)!r} cannot be loaded, it may be damaged or cut off: "
                f"{one_line(error)}",
                "Export or download the model again.",
            ) from error
        if exported.config is None:
            raise SavedModelError(f"{str(directory)!r} has no config.json.", "Export or download the model again.")
        model = cls(exported, exported.config, exported.generation_config)
        _check_providers(providers, model.providers)
        return model

    @property
    def session(self) -> Any:
        """ONNX Runtime's session."""
        return self._runner.session

    @property
    def providers(self) -> list[str]:
        """The execution providers of the session, in order of preference."""
        return list(self.session.get_providers())

    @property
    def device(self) -> torch.device:
        """Device of the inputs and outputs."""
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._exported.dtype

    @property
    def _runner(self) -> Any:
        return self._exported.runners["model"]

    def step(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: Cache, logits_to_keep: Tensor
    ) -> tuple[Tensor, Cache]:
        """Run the graph once; see `GraphCausalLM.step`."""
        out = self._exported(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            logits_to_keep=logits_to_keep,
        )
        return out.logits, out.cache


def default_options(threads: int | None = None) -> Any:
    """Options of an ONNX Runtime session: it logs errors only, and has `threads` threads (None: PyTorch's number)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return options


def _check_providers(providers: Sequence[Provider], available: Sequence[str]) -> None:
    """Refuse a provider that is not available; ONNX Runtime would fall back to the CPU."""
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise UserError(
                f"ONNX Runtime cannot run on {name} here (it has {', '.join(available)}).",
                'CUDA and TensorRT need an NVIDIA GPU and pip install "selfpruner-hub[onnx-gpu]" without onnxruntime '
                "beside it.",
            )
