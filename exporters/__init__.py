"""Export to other formats, and benchmarks of models in their runtimes."""

from exporters.to_onnx.causal_lm import OnnxCausalLM

__all__ = ["OnnxCausalLM"]
