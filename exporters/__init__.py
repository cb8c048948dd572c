"""Export to other formats, and benchmarks of models in their runtimes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.to_onnx.causal_lm import OnnxCausalLM

__all__ = ["OnnxCausalLM"]


def __getattr__(name: str) -> Any:
    """Import `OnnxCausalLM` on first access: the registry of formats is read where torch would take seconds."""
    if name != "OnnxCausalLM":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporters.to_onnx.causal_lm import OnnxCausalLM

    return OnnxCausalLM
