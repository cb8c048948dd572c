"""Folders of a published model, and folders of data that come with the package."""

from __future__ import annotations

import json
from pathlib import Path

from selfpruner_hub.errors import SavedModelError, UserError

PLOTS = "plots"
"""Folder of a published model with the plots of its search."""
EXPORTS = {
    "onnx": "exporters.to_onnx",
    "tensorrt": "exporters.to_tensorrt",
    "openvino": "exporters.to_openvino",
    "gguf": "exporters.to_gguf",
}
"""Formats of exports, which are folders of a published model, and the package of each: see `exporters.format`."""

WEIGHTS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Names of the files of weights that transformers looks for in a directory."""

EXPORTED = ("*.gguf", "*.onnx", "*.onnx*data", "onnx", "genai_config.json", "openvino_model.*", "*.engine")
"""Patterns of what an export has beside the files of every format, in its directory."""

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""Names of the files of a tokenizer, without its chat templates."""
TEMPLATES = ("chat_template.jinja", "additional_chat_templates")
"""Names of its chat templates: a file, and a folder of further ones."""
MODEL_CODE = "modeling_selfpruned.py"
"""Name of the file of model code; a stock model has none."""
GENERATION = "generation_config.json"
"""Name of the file of generation settings."""


def known_export(name: object) -> str:
    """Return the name of a format of exports.

    Args:
        name: Name that was asked for.

    Returns:
        The name.

    Raises:
        UserError: It is no format.
    """
    if not isinstance(name, str) or name not in EXPORTS:
        raise UserError(f"Unknown format {name!r}.", f"Choose {', '.join(EXPORTS)}.")
    return name


def weight_files(directory: Path) -> list[str]:
    """List the files of weights of a saved model.

    Args:
        directory: Directory of the model.

    Returns:
        Names of the shards of its index, or that of the only file.

    Raises:
        SavedModelError: The index is damaged, or names files outside the directory.
    """
    index = directory / "model.safetensors.index.json"
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in shards if Path(name).is_absolute() or ".." in Path(name).parts]
    except FileNotFoundError:
        shards, outside = [], []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SavedModelError(f"{index} is damaged.", "Save or download the model again.") from error
    if outside:
        raise SavedModelError(f"{index} names weights outside of the model: {outside[0]!r}.", "Do not use this model.")
    return shards or ["model.safetensors"]


def asset(name: str) -> Path:
    """Return a folder of data: a wheel has it inside the package, a checkout beside the package."""
    inside = Path(__file__).parents[1] / name
    return inside if inside.is_dir() else Path(__file__).parents[2] / name
