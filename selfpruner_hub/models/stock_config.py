"""The `config.json` of a stock model: with the RoPE keys of transformers 4 beside those of transformers 5.

transformers 5 writes `rope_parameters` alone. mlx-lm and the import of Ollama read `rope_theta` at the top level, take
their default where it is missing, and then compute another function without an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner_hub.models.architectures import is_stock
from selfpruner_hub.models.weights import is_tied


def rope_keys(config: PreTrainedConfig) -> dict[str, Any]:
    """Repeat the rotary parameters of a configuration under the keys of transformers 4.

    transformers 5 reads a configuration with them to the same `rope_parameters`.

    Args:
        config: Configuration of a dense or pruned model.

    Returns:
        `rope_theta`, `rope_scaling` (None for the default kind) and, where the configuration has one,
        `partial_rotary_factor`. Where layers of full and of sliding attention have parameters of their own (Gemma 3,
        OLMo 3), those of full attention; Gemma 3 also has `rope_local_base_freq`, the base of sliding attention.
    """
    by_kind = config.rope_parameters
    rope = by_kind.get("full_attention", by_kind)
    keys = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in keys}
    keys["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if config.model_type.endswith("gemma3_text"):
        keys["rope_local_base_freq"] = by_kind["sliding_attention"]["rope_theta"]
    return keys


def save_model(model: PreTrainedModel, directory: Path, **saving: Any) -> None:
    """Save a model, tied if its weights are; the `config.json` of a stock class has the RoPE keys of transformers 4.

    Args:
        model: Dense or pruned model.
        directory: Directory of the model.
        **saving: Keyword arguments of transformers' `save_pretrained`.
    """
    model.config.tie_word_embeddings = is_tied(model)
    model.save_pretrained(directory, **saving)
    if not is_stock(model):
        return
    path = directory / "config.json"
    values = json.loads(path.read_text(encoding="utf-8")) | rope_keys(model.config)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
