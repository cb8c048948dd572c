"""An ONNX export that writes text: transformers' `generate()` over ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedConfig

from exporters.graph_causal_lm import GraphCausalLM
from exporters.writer import one_line, require
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.models.loading import resolve_directory
from selfpruner_hub.storage.export_record import read_export

Provider = str | tuple[str, dict[str, Any]]
"""An execution provider of ONNX Runtime, with its options where it has any."""
DEFAULT_PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider", "none": "CPUExecutionProvider"}
"""By the provider that the graph was fused for."""


class OnnxCausalLM(GraphCausalLM):
    """A causal language model in ONNX Runtime.

    Example:
        >>> model = OnnxCausalLM.from_pretrained("smollm2-b30-onnx")
        >>> ids = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8)

    Args:
        exported: What transformers' exporter wrote, its session open.
        config: Of the model that was exported.
        generation_config: Its defaults for `generate()`.
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
            name: A directory that `selfpruner export --to onnx` wrote, or a Hub repository.
            providers: ONNX Runtime's execution providers in order of preference; all of them must be there. None takes
                the one that the graph was fused for.
            threads: Of the CPU provider; None takes as many as PyTorch does.
            session_options: Of ONNX Runtime; it replaces `threads`.
            subfolder: Where in the directory or repository the export is.
            **kwargs: `revision`, `token`, `cache_dir` and `local_files_only` of a Hub repository.

        Returns:
            The model, ready to run.

        Raises:
            MissingExtraError: onnxruntime is not installed.
            UserError: A provider is not there.
            SavedModelError: There is no ONNX export, or it is damaged.
        """
        require("onnxruntime", "onnx")
        directory = resolve_directory(str(name), subfolder, **kwargs)
        record = read_export(directory, "onnx")
        return cls.open(
            directory, list(providers or [DEFAULT_PROVIDERS[record.options["fusions"]]]), threads, session_options
        )

    @classmethod
    def open(
        cls, directory: Path, providers: Sequence[Provider], threads: int | None = None, session_options: Any = None
    ) -> OnnxCausalLM:
        """Load the files of an export; `from_pretrained` has the arguments.

        Args:
            directory: Where they are.
            providers: ONNX Runtime's execution providers; all of them must be there.
            threads: Of the CPU provider; None takes as many as PyTorch does.
            session_options: Of ONNX Runtime.

        Returns:
            The model, ready to run.

        Raises:
            UserError: A provider is not there.
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
        """The execution providers that run it, first choice first."""
        return list(self.session.get_providers())

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._runner.device

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
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
    """Options of an ONNX Runtime session: errors alone are logged; as many threads as PyTorch has, or `threads`."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    return options


def _check_providers(wanted: Sequence[Provider], there: Sequence[str]) -> None:
    """ONNX Runtime falls back to the CPU where it cannot have a provider: refuse that."""
    for provider in wanted:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in there:
            raise UserError(
                f"ONNX Runtime cannot run on {name} here (it has {', '.join(there)}).",
                'CUDA and TensorRT need an NVIDIA GPU and pip install "selfpruner-hub[onnx-gpu]" without onnxruntime '
                "beside it.",
            )
