"""The tokenizer of both models, and how it encodes a visitor's prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

from model_source import UnavailableError, cannot_be_loaded, shown
from transformers import AutoTokenizer


@cache
def tokenizer() -> Any:
    """Load the pruned model's tokenizer, which is the parent's."""
    at = shown()
    try:
        # transformers reads config.json first, and without trust_remote_code it would ask on the terminal
        return AutoTokenizer.from_pretrained(at.pruned, revision=at.revision, trust_remote_code=True)
    except Exception as error:  # transformers and the Hub's client share no base class
        raise UnavailableError(cannot_be_loaded(at.pruned, error)) from error


def encode_prompt(tokenizer: Any, prompt: str) -> Any:
    """Encode a prompt, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)
