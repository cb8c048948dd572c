"""Tiny random models of images and text, whose text model is one of the tiny ones."""

from __future__ import annotations

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

from support.tiny import CONFIGS

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}


def gemma3() -> PreTrainedModel:
    vision = SiglipVisionConfig(**SIZES, patch_size=14)
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=CONFIGS["gemma3"], vision_config=vision, mm_tokens_per_image=4)
    )


def mistral3(text: str) -> PreTrainedModel:
    vision = PixtralVisionConfig(**SIZES, patch_size=14)
    config = Mistral3Config(vision_config=vision, text_config=CONFIGS[text], tie_word_embeddings=False)
    return Mistral3ForConditionalGeneration(config)


WRAPPERS = {"gemma3": gemma3, "mistral3": lambda: mistral3("mistral"), "ministral3": lambda: mistral3("ministral3")}


def tiny_wrapper(name: str) -> PreTrainedModel:
    """Build the wrapper `name` of `WRAPPERS` with random weights."""
    torch.manual_seed(0)
    model = WRAPPERS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
