"""Folders of a published model, and folders of data that come with the package."""

from __future__ import annotations

from pathlib import Path

PLOTS = "plots"
EXPORTS = ("onnx", "tensorrt", "openvino", "gguf", "padded")
"""Folders of a published model: plots of its search, and exports, each named after its format."""

WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of the files of weights that transformers looks for in a directory."""

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""Names of the files of a tokenizer, without its chat templates."""
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
"""Names of its chat templates: a file, and a folder of further ones."""
GENERATION = "generation_config.json"
"""Name of the file of generation settings."""


def asset(name: str) -> Path:
    """Return a folder of data: a wheel has it inside the package, a checkout beside the package."""
    inside = Path(__file__).parents[1] / name
    return inside if inside.is_dir() else Path(__file__).parents[2] / name
