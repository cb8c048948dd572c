"""Pruning and repair of a random Llama of 3 B parameters in less memory than its weights take.

Run: python benchmarks/offload.py WORK TEXT
(here: WikiText-2 raw, articles a)
WORK: a directory on a disk with 30 GB free; a model that exists in it is reused.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from protocol import memory, peak_of_memory, write
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from selfpruner_hub.cli.demo import load_embedded
from selfpruner_hub.progress import Bars
from selfpruner_hub.pruner import AutoPruner

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "num_hidden_layers": 84,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 49152,
}
SETTINGS = {"calibration_tokens": 2048, "fitness_tokens": 512, "evaluations": 0, "seeds": ("uniform",)}
BETA, SHARD, LAYERS_A_SHARD = 0.3, "1GB", 12


def build(directory: Path) -> None:
    """Write the weights, one shard at a time, and SmolLM2's tokenizer."""
    if (directory / "tokenizer.json").is_file():
        return
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        named = dict(LlamaForCausalLM(config).named_parameters())
    config.save_pretrained(directory)
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in named.items():
        number = int(name.split(".")[2]) // LAYERS_A_SHARD if ".layers." in name else 0
        shards.setdefault(f"model-{number}.safetensors", {})[name] = tuple(parameter.shape)
    torch.manual_seed(0)
    for file, shapes in shards.items():
        save_file({name: drawn(shape) for name, shape in shapes.items()}, directory / file, {"format": "pt"})
    places = {name: file for file, shapes in shards.items() for name in shapes}
    size = 2 * sum(parameter.numel() for parameter in named.values())
    (directory / SAFE_WEIGHTS_INDEX_NAME).write_text(
        json.dumps({"metadata": {"total_size": size}, "weight_map": places})
    )
    load_embedded().tokenizer.save_pretrained(directory)


def drawn(shape: tuple[int, ...]) -> Tensor:
    """Initial tensor: ones for norms, normal with standard deviation 0.02 for matrices, to keep activations stable."""
    return torch.ones(shape).bfloat16() if len(shape) == 1 else (0.02 * torch.randn(shape)).bfloat16()


def main(work: Path, text: str) -> None:
    """Build, prune and save the model; report the time and memory of each."""
    build(work / "dense")
    before = memory()
    started, stages = time.perf_counter(), dict[str, float]()
    with peak_of_memory() as peak, Bars() as bars:

        def report(what: str, done: float, total: float, *notes: str) -> None:
            bars(what, done, total, *notes)
            stages[what] = time.perf_counter() - started

        pruner = AutoPruner.from_pretrained(str(work / "dense"), offload_folder=work / "scratch")
        stages["loading"] = time.perf_counter() - started
        pruned = pruner.prune(BETA, data=text, progress=report, **SETTINGS)
        pruned.save_pretrained(work / "pruned", max_shard_size=SHARD)
        stages["saving"] = time.perf_counter() - started
    files = sorted(path.name for path in (work / "pruned").glob("*.safetensors"))
    counts = pruned.report.parameters
    write(
        "offload",
        f"a random Llama ({SHAPE}) in bfloat16, β = {BETA}, {SETTINGS}; text: {Path(text).name}; weights, "
        "statistics and hidden states in files; minutes from the start to the end of each stage; resident memory: "
        "before, and its peak",
        {
            "parameters": counts,
            "weights_megabytes": round(2 * counts["dense"] / 1e6),
            "memory_megabytes": {"before": round(before), "peak": round(peak())},
            "minutes": {what: round(seconds / 60, 1) for what, seconds in stages.items()},
            "shards": len(files),
        },
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
