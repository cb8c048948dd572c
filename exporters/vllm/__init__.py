"""Models in vLLM."""
