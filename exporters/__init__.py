"""Out of PyTorch, and how fast it is there."""

from exporters.onnx_causal_lm import OnnxCausalLM

__all__ = ["OnnxCausalLM"]
