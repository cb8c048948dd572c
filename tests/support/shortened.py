"""A real model that is cheap to export: its first layers alone."""

from __future__ import annotations

import re

from transformers import PreTrainedModel


def shortened(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Copy a pruned model's first layers, embeddings and head; its logits reach 80."""
    values = model.config.to_dict()
    widths = {int(index): own for index, own in values["per_layer_config"].items() if int(index) < layers}
    short = type(model)(type(model.config)(**{**values, "num_hidden_layers": layers, "per_layer_config": widths}))
    state = {key: value for key, value in model.state_dict().items() if _layer(key) < layers}
    short.load_state_dict(state)
    short.generation_config = model.generation_config
    return short.to(model.dtype).eval()


def _layer(key: str) -> int:
    found = re.search(r"\.layers\.(\d+)\.", key)
    return int(found[1]) if found else 0
