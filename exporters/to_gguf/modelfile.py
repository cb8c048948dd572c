"""A `Modelfile`, from which `ollama create` makes a model of a GGUF file."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONTEXT = 8192
"""Most tokens of context that the file asks for: the memory of the cache grows with them."""
SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Ollama's name of each sampling parameter of a generation configuration."""


def modelfile(file: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: int) -> str:
    """Describe a GGUF file for Ollama, which reads the chat template from the file itself.

    Args:
        file: Name of the GGUF file, in the same directory.
        model: Model, whose generation configuration gives end tokens and sampling.
        tokenizer: Its tokenizer; None names no end tokens.
        context: Longest context for which the file is exact, in tokens.

    Returns:
        Content of the `Modelfile`.
    """
    generation = model.generation_config
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(context, CONTEXT)}"]
    for name, ollama in SAMPLING.items():
        if (value := getattr(generation, name, None)) is not None:
            lines.append(f"PARAMETER {ollama} {value}")
    ends = getattr(generation, "eos_token_id", None)
    if tokenizer is not None:
        ids = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(index)}"' for index in sorted(ids)]
    return "\n".join(lines) + "\n"
