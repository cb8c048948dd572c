"""Out of PyTorch, and how fast it is there."""

from exporters.to_onnx.causal_lm import OnnxCausalLM

__all__ = ["OnnxCausalLM"]
