"""Export to a zero-padded model of the stock architecture, for runtimes that need equal widths in all layers.

It loads without remote code and computes the same logits. It is not faster, because the zeros are multiplied too.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import CONFIG_MAPPING

from exporters.padding import padded_state
from exporters.parity import Step, expected, logit_difference
from exporters.writer import Written, one_of
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, shape_of
from selfpruner_hub.models.stock_config import save_model
from selfpruner_hub.models.weights import is_tied, rebuild_buffers
from selfpruner_hub.plans.plan import LayerWidths

PADDED_WIDTHS = ("widest", "dense")
PADDED_TOLERANCES = {"float32": 1e-4, "float16": 0.1, "bfloat16": 1.0}
"""Largest allowed distance of a logit from PyTorch's in float32, by dtype of the saved weights."""
REMARK = "A padded twin runs anywhere and brings no speed: it is as large as its widest layer, all the way."


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    staging: Path,
    *,
    width: str = "widest",
    dtype: str = "float32",
) -> Written:
    """Save the padded model, and compare it, reloaded by the stock class, with the PyTorch model.

    Args:
        model: Dense or pruned model, float32, on the CPU.
        tokenizer: Unused; `staging` already holds it.
        staging: Directory of the padded model.
        width: FFN width of every layer: `"widest"` (of the widest layer) or `"dense"` (of the dense model).
            Attention is always padded to the dense heads: many runtimes derive the head size from their number.
        dtype: Dtype of the saved weights: `"float32"`, `"float16"` or `"bfloat16"`.

    Returns:
        Report of what was written.
    """
    one_of("dtype", dtype, tuple(PADDED_TOLERANCES))
    twin = padded_model(model, one_of("width", width, PADDED_WIDTHS))
    save_model(twin.to(getattr(torch, dtype)), staging)
    return Written(
        options={"width": width, "dtype": dtype},
        libraries=(),
        tolerance=PADDED_TOLERANCES[dtype],
        compare=lambda: partial(_difference, expected(model), staging),
        remark=REMARK,
    )


def padded_model(model: PreTrainedModel, width: str = "widest") -> PreTrainedModel:
    """Build the padded model; it shares the tensors that are not padded.

    Args:
        model: Dense or pruned model.
        width: FFN width of every layer, `"widest"` or `"dense"`; see `write`.

    Returns:
        A model of the stock class, in eval mode.
    """
    shape = shape_of(model.config)
    config = _stock_config(model, max(w.intermediate_size for w in shape.dense.layers), width)
    target = LayerWidths(config.intermediate_size, config.num_key_value_heads)
    with torch.device("meta"):
        twin = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config))
    state = {k: v for k, v in model.state_dict().items() if ".layers." not in k}
    prefix = next(name for name, module in twin.named_modules() if module is decoder_layers(twin))
    for index, (layer, widths) in enumerate(zip(decoder_layers(model), shape.dense.layers, strict=True)):
        padded = padded_state(layer, model.config, widths, target)
        state.update({f"{prefix}.{index}.{name}": tensor for name, tensor in padded.items()})
    twin.load_state_dict(state, assign=True, strict=True)
    twin.tie_weights()
    rebuild_buffers(twin)
    if model.generation_config is not None:
        twin.generation_config = model.generation_config
    return twin.eval()


def _stock_config(model: PreTrainedModel, widest: int, width: str) -> PreTrainedConfig:
    """The dense configuration under the stock `model_type`, with the padded FFN width."""
    config, values = model.config, model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "per_layer_config", "transformers_version"):
        values.pop(key, None)
    if width == "widest":
        values["intermediate_size"] = widest
    values |= {"head_dim": shape_of(config).head_dim, "tie_word_embeddings": is_tied(model)}
    return CONFIG_MAPPING[architecture_of(config).model_type](**values)


def _difference(passes: list[Step], directory: Path) -> float:
    twin: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=False)
    return logit_difference(passes, twin.eval())
