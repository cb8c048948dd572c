"""Models that transformers loads, timed."""

from __future__ import annotations

from exporters.runtime import CausalLMRunner, Setting
from selfpruner_hub.models.loading import load_model


def load(name: str, setting: Setting) -> CausalLMRunner:
    """Load a model for a benchmark; see `Format.load`."""
    device = None if "device_map" in setting.loading else setting.device
    model, _ = load_model(name, dtype=setting.dtype, device=device, **setting.loading)
    return CausalLMRunner(model, model.device)
