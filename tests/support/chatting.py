"""Tiny models that chat: a template of ASCII characters, and weights that end their turns."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerFast

from support.tiny import tiny_model, tiny_tokenizer

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_chat(directory: Path, seed: int = 0) -> Path:
    """Save a tiny dense chat model."""
    tiny_model("llama", seed=seed, max_position_embeddings=1024).save_pretrained(directory)
    chat_tokenizer().save_pretrained(directory)
    return directory
