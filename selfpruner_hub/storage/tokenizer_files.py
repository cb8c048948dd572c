"""Load the tokenizer of a model, and tell one that is broken from none."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import list_repo_files
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selfpruner_hub.errors import ModelError
from selfpruner_hub.storage.layout import TOKENIZER


def load_tokenizer(name: str, **kwargs: Any) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer.

    Args:
        name: Directory or Hub repository of the model.
        **kwargs: Keywords of transformers' `from_pretrained` that locate files.

    Returns:
        The tokenizer; None if there are no files of one. Without files, transformers makes empty tokenizers of some
        types, with special tokens alone.

    Raises:
        ModelError: There are files of a tokenizer, or may be, and it cannot be loaded.
    """
    failure: Exception | None = None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **kwargs)
        if tokenizer.vocab_size > len(tokenizer.all_special_tokens):
            return tokenizer
        reason = "it has no vocabulary"
    except Exception as error:  # transformers, tokenizers and the Hub client share no base class
        failure = error
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if _has_none(name, **kwargs):
        return None
    raise ModelError(
        f"The tokenizer of {name!r} cannot be loaded: {reason}"[:400].rstrip(".") + ".",
        "Install what is missing, or download its files again.",
    ) from failure


def _has_none(name: str, gguf_file: str | None = None, subfolder: str = "", **kwargs: Any) -> bool:
    """Whether there are certainly no files of a tokenizer; a GGUF file always brings one."""
    if gguf_file is not None:
        return False
    if Path(name).is_dir():
        return not any((Path(name) / subfolder / file).exists() for file in TOKENIZER)
    try:
        names = list_repo_files(name, revision=kwargs.get("revision"), token=kwargs.get("token"))
    except Exception:  # out of reach: the error of the tokenizer itself is told
        return False
    return not any((PurePosixPath(subfolder) / file).as_posix() in names for file in TOKENIZER)
