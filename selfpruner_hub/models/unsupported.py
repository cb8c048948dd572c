"""Models that cannot be pruned or saved: the reason, found in the configuration before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from selfpruner_hub.errors import ModelError, UnsupportedArchitectureError, UserError

MOST_LAYERS = 10_000
_WITH_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
"""Kinds of layers that have attention over tokens."""
_OF_OTHER_LAYERS = ("mamba_", "ssm_", "linear_", "conv_L_cache", "state_size", "lru_width", "time_step_")
"""Beginnings of the names of settings that only state-space, convolution and recurrent layers have."""
_NUMBER_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


def reason(config: PreTrainedConfig) -> str:
    """Say what keeps a model of an unsupported type from being pruned.

    Args:
        config: Configuration of a model whose type is not in the table of architectures.

    Returns:
        A clause about models of this type, such as "they are mixtures of experts"; empty if nothing but the table does.
    """
    if config.is_encoder_decoder:
        return "they are encoder-decoders"
    text = config.get_text_config()
    if text is not config:
        return f"they wrap a text model of type {text.model_type!r}"
    if _has_other_layers(config):
        return "some of their layers have no attention"
    if "moe" in config.model_type or any((getattr(config, name, None) or 0) > 1 for name in _NUMBER_OF_EXPERTS):
        return "they are mixtures of experts"
    return ""


def _has_other_layers(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    return not _WITH_ATTENTION.issuperset(kinds) or any(name.startswith(_OF_OTHER_LAYERS) for name in config.to_dict())


def check_is_model(given: Any, what: str) -> None:
    """Raise `UserError` unless `given` is a transformers model; `what` names the argument."""
    if not isinstance(given, PreTrainedModel):
        raise UserError(
            f"{what} must be a transformers model; got {type(given).__name__}.",
            "Load it first: AutoModelForCausalLM.from_pretrained(NAME).",
        )


def check_layers(values: Any, name: str) -> None:
    """Raise if a configuration has more layers than any model: transformers would count them for ever.

    Args:
        values: Content of its config.json.
        name: Directory or Hub repository of the model.

    Raises:
        ModelError: It has.
    """
    parts = (values, *values.values()) if isinstance(values, Mapping) else ()
    for part in parts:
        layers = part.get("num_hidden_layers") if isinstance(part, Mapping) else None
        if isinstance(layers, (int, float)) and layers > MOST_LAYERS:
            raise ModelError(f"{name!r} has {layers} layers by its config.json.", "Download or save it again.")


def check_generation(model: PreTrainedModel) -> None:
    """Raise if the generation settings of a model contradict each other, so that it could not be saved after its run.

    Those of a file (Vicuna's has a temperature without sampling) are saved as they are until someone changes them.

    Args:
        model: A model.

    Raises:
        UserError: They do, such as a temperature without sampling.
    """
    settings = model.generation_config
    changed = getattr(settings, "_original_object_hash", None) != hash(settings)  # as transformers tells it
    try:
        settings.validate(strict=changed)
    except ValueError as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.startswith("- ")] or [str(error)]
        raise UserError(
            f"The generation settings of the model cannot be saved: {lines[0]}"[:400],
            "They are in its generation_config.json, and in model.generation_config.",
        ) from error


def refuse_quantized(config: PreTrainedConfig, name: str, asked: Any = None) -> None:
    """Raise if the weights are quantised, or will be when they are loaded.

    Args:
        config: Configuration of the model.
        name: Directory or Hub repository of the model.
        asked: Quantization with which it is to be loaded, as a configuration of transformers or a dictionary; one with
            `dequantize=True` turns the weights into those of a dense model.

    Raises:
        UnsupportedArchitectureError: The weights are, or will be, quantised.
    """
    quantization = asked or getattr(config, "quantization_config", None)
    values = quantization if isinstance(quantization, dict) else vars(quantization or object)
    if quantization and not values.get("dequantize"):
        method = values.get("quant_method", "unknown method")
        raise UnsupportedArchitectureError(
            f"The weights of {name!r} are quantised ({getattr(method, 'value', method)}), and cannot be cut.",
            "Prune the model in bfloat16 or float32 that it was made from; quantise the result.",
        )
