"""What every part of the GPU benchmark is given: device, sizes, clock, results; and random models."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protocol import peak_of_memory, write
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.pruning.slicing import pruned_config

NAME = "gpu"
PROTOCOL = (
    "Random Llamas in bfloat16, made on the device, random tokens: seconds and memory do not depend on the text. "
    "Parts run one after the other, each in a process of its own; a row has a `part`, and `skipped`, `stopped`, "
    "`failed` or `not_installed` says why figures are missing. stages: the stages of `prune` with the default settings "
    "at β = 0.3 but for the tokens and evaluations of the row; seconds, MB (10⁶ bytes) that PyTorch had allocated at "
    "the start and at the peak, weights included. speed: milliseconds of the whole batch, as median and interquartile "
    "range, of prefill (stock `sdpa` attention) and of a decode step over a static cache, each replayed as a CUDA "
    "graph; dense and pruned one after the other, so speedup is the ratio of medians; ideal is the ratio of "
    "floating-point operations for prefill and of bytes for decode. writing: tokens a second of greedy text, all rows "
    "together. copies: GB (10⁹ bytes) a second of one layer, to the device, from where it rests. onnx, "
    "tensorrt: as `selfpruner benchmark` does it, dense and pruned in turn, on fewer layers"
)
_SIZES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
SIZES = {**_SIZES, "8b-layer": {**_SIZES["8b"], "num_hidden_layers": 1}}
"""Sizes of Llama-3.2-1B, of Llama-3.1-8B, and of one layer of the latter."""
TINY = {
    "hidden_size": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "vocab_size": 256,
}


@dataclass
class Bench:
    """What a part is given.

    Attributes:
        device: Device of the models.
        tiny: Flag for tiny models, few tokens and few runs, to try the script.
        output: Directory of `gpu.json`.
        deadline: Time at which the part has to end, as `time.monotonic` tells it.
    """

    device: torch.device
    tiny: bool
    output: Path
    deadline: float

    def left(self) -> float:
        """Seconds until the part has to end."""
        return self.deadline - time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        """Rows in the file so far; parts run in processes of their own, so it is read each time."""
        path = self.output / f"{NAME}.json"
        results: list[dict[str, Any]] = json.loads(path.read_text())["results"] if path.exists() else []
        return results

    def keep(self, part: str, **row: Any) -> None:
        """Add a row to the file, and print it."""
        print(part, row, flush=True)
        write(NAME, PROTOCOL, [*self.rows(), {"part": part, **row}], self.output)

    def sizes(self, name: str) -> dict[str, Any]:
        """Sizes of a model of `SIZES`; tiny ones where that is asked for."""
        return TINY if self.tiny else SIZES[name]


def dense_config(sizes: dict[str, Any]) -> LlamaConfig:
    """Make the configuration of a dense Llama."""
    return LlamaConfig(**sizes, max_position_embeddings=8192, pad_token_id=None)


def shape(sizes: dict[str, Any]) -> ModelShape:
    """Geometry of a dense Llama."""
    return shape_of(dense_config(sizes))


def random_model(sizes: dict[str, Any], device: torch.device, plan: Plan | None = None) -> PreTrainedModel:
    """Build a random Llama in bfloat16; its weights are made on the device.

    Args:
        sizes: Sizes of the dense model.
        device: Device of the weights.
        plan: Widths of a pruned model; None builds the dense one.

    Returns:
        The model, in eval mode.
    """
    torch.manual_seed(0)
    config: Any = dense_config(sizes)
    if plan is not None:
        with torch.device("meta"):
            config = pruned_config(AutoModelForCausalLM.from_config(config), plan)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@contextmanager
def measured(device: torch.device) -> Iterator[dict[str, float]]:
    """Yield a dictionary that gets the seconds of the context, and its memory in MB at the start and at the peak.

    On a CPU, memory is what is resident, the libraries included.
    """
    figures: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        figures["start_mb"] = round(torch.cuda.memory_allocated(device) / 1e6, 1)
        started = time.perf_counter()
        try:
            yield figures
        finally:
            torch.cuda.synchronize(device)
            figures["seconds"] = round(time.perf_counter() - started, 3)
            figures["peak_mb"] = round(torch.cuda.max_memory_allocated(device) / 1e6, 1)
        return
    with peak_of_memory() as peak:
        figures["start_mb"], started = round(peak(), 1), time.perf_counter()
        try:
            yield figures
        finally:
            figures["seconds"], figures["peak_mb"] = round(time.perf_counter() - started, 3), round(peak(), 1)
