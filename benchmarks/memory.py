"""Memory and time of a default run for models from 1 to 70 billion weights, counted from their shapes; nothing runs.

Run: python benchmarks/memory.py
Memory is what `selfpruner_hub.memory` counts. Minutes are estimates: products by their number over the rates below, and
what is copied over the rate of its way.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from columns import COLUMNS, shown
from protocol import write
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config

from selfpruner_hub.memory import needs
from selfpruner_hub.models.architectures import decoder_layers, shape_of
from selfpruner_hub.settings import resolve

BETA = 0.3
GB = 1e9
RATES = {"bfloat16": 550e12, "tf32": 300e12, "float32": 48e12}
"""Products of an H100 SXM per second, in the dtypes of passes, of sums over tokens, and of solves."""
WAYS = {"device": 0.0, "host": 1 / 50e9, "files": 1 / 3e9}
"""Seconds for a byte that is copied to the device, by the place where it rests."""
PASSES, SUMS, SOLVES = 10.5, 1.7, 18
"""Of a default run without a search: passes over the weights of the layers with the whole calibration text; sums of
products, in those of one pass; solves, in F³ for each layer. Counted for Llama-3.1-8B."""
READINGS = {"host": 0, "files": 15}
"""Times that all weights are read."""


def llama(**sizes: Any) -> LlamaConfig:
    """A configuration of Llama 3's kind."""
    return LlamaConfig(vocab_size=128_256, num_key_value_heads=8, dtype="bfloat16", **sizes)


def qwen(**sizes: Any) -> Qwen2Config:
    """A configuration of Qwen2.5's kind."""
    return Qwen2Config(vocab_size=152_064, num_key_value_heads=8, num_attention_heads=40, dtype="bfloat16", **sizes)


MODELS = {
    "Llama-3.2-1B": llama(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64,
        tie_word_embeddings=True,
    ),
    "Llama-3.2-3B": llama(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "Qwen2.5-14B": qwen(hidden_size=5120, intermediate_size=13824, num_hidden_layers=48),
    "Qwen2.5-32B": qwen(hidden_size=5120, intermediate_size=27648, num_hidden_layers=64),
    "Llama-3.1-70B": llama(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}  # fmt: skip


def main() -> None:
    """Count every model, write the rows, and print them as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="DIR", help="directory of the JSON (default: benchmarks)")
    options = parser.parse_args()
    rows = [row(name, config) for name, config in MODELS.items()]
    print(shown(rows, COLUMNS["memory"]))
    protocol = (
        f"a default run (β {BETA:g}, {resolve('default').calibration_tokens:,} tokens of calibration text, no search, "
        "no writing of text) in bfloat16, counted from published shapes; nothing was run on a GPU. Minutes are "
        f"estimates for an H100: {RATES} products a second, and seconds for a byte that is copied: {WAYS}"
    )
    write("memory", protocol, rows, options.output)


def row(name: str, config: LlamaConfig | Qwen2Config) -> dict[str, Any]:
    """The figures of one model, in GB and minutes."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    settings = resolve("default")
    resting, working, passing = needs(model, settings, BETA)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    in_layers = sum(parameter.nbytes for parameter in decoder_layers(model).parameters())
    outside = weights - in_layers
    checkpoints = 8 * config.hidden_size**2 * config.num_hidden_layers + (1 - BETA) * in_layers
    return {
        "model": name,
        "parameters": round(model.num_parameters() / 1e9, 2),
        "weights": round(weights / GB, 1),
        "device": round((weights + resting + passing + working) / GB, 1),
        "device_host": round((weights + working) / GB, 1),
        "host": round((resting + passing) / GB, 1),
        "device_files": round((2 * outside + passing + working) / GB, 1),
        "disk": round((weights + resting + checkpoints) / GB, 1),
        **{f"minutes_{way}": round(minutes(model, resting, way), 1) for way in WAYS},
    }


def minutes(model: PreTrainedModel, resting: int, way: str) -> float:
    """Estimate the minutes of a run whose tensors rest in one place."""
    shape, settings = shape_of(model.config), resolve("default")
    tokens, layers = settings.calibration_tokens, shape.num_layers
    ffn = shape.dense.layers[0].intermediate_size
    attention = model.config.num_attention_heads * shape.head_dim
    seconds = {
        "bfloat16": PASSES * 2 * shape.weights(shape.dense) * tokens,
        "tf32": SUMS * 2 * tokens * layers * (ffn**2 + attention**2),
        "float32": SOLVES * layers * ffn**3,
    }
    weights = sum(parameter.nbytes for parameter in model.parameters())
    streams = 12 * layers * 4 * tokens * shape.hidden_size * model.dtype.itemsize  # each step of a layer reads them
    repairs = 4 * layers * (26 * ffn**2 + 24 * ffn * shape.hidden_size) if way == "host" else 0  # the second one's sums
    copied = 3 * resting + streams + repairs + READINGS.get(way, 0) * weights
    return (sum(count / RATES[dtype] for dtype, count in seconds.items()) + WAYS[way] * copied) / 60


if __name__ == "__main__":
    main()
