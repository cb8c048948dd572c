"""What runs the two models: llama.cpp, where a GGUF file was published with the model, else PyTorch.

Both models run in the same engine and dtype, because a comparison across engines would be unfair. So where either
cannot run in llama.cpp, both run in PyTorch.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from shown import UnavailableError, cannot_be_loaded, record, shown
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextStreamer

LONGEST = 4_096
"""Longest prompt and answer together in llama.cpp, which takes the memory of its cache at once, in tokens."""
_GROWTH = 1.3
"""Memory of a model during generation, as a multiple of its weights."""
_FLOAT32 = 4
"""Bytes of a weight while the dense model is converted."""

Told = Callable[[str, int], bool]
"""Callback of an engine: called with each piece of text and the number of tokens so far, it returns whether to stop."""


class Engine(Protocol):
    """A model that is loaded and generates greedy text."""

    @property
    def runtime(self) -> str:
        """Runtime, dtype and threads, in words."""
        ...

    @property
    def longest(self) -> int:
        """Longest prompt and answer together, in tokens."""
        ...

    def write(self, ids: list[int], tokens: int, told: Told) -> None:
        """Generate at most `tokens` tokens after the prompt `ids`, and hand each piece to `told` until it says stop."""
        ...


_loading = threading.Lock()


def load(which: str) -> Engine:
    """Load the model `pruned` or `dense`."""
    with _loading:  # two visitors share one download
        return _load(which)


@cache
def _load(which: str) -> Engine:
    engines, _ = _in_llama_cpp()
    return engines[which] if engines else _in_pytorch(which)


def why_pytorch() -> str:
    """Return why a published GGUF file is not used, in a sentence; empty where it is, or where there is none."""
    with _loading:
        return _in_llama_cpp()[1]


@cache
def tokenizer() -> Any:
    """Load the pruned model's tokenizer, which is the parent's."""
    at = shown()
    try:
        # transformers reads config.json first, and without trust_remote_code it would ask on the terminal
        return AutoTokenizer.from_pretrained(at.pruned, revision=at.revision, trust_remote_code=True)
    except Exception as error:  # transformers and the Hub's client share no base class
        raise UnavailableError(cannot_be_loaded(at.pruned, error)) from error


def encode(tokenizer: Any, prompt: str) -> Any:
    """Encode a prompt, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)


# -- PyTorch ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchEngine:
    """A transformers model and its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def runtime(self) -> str:
        """Runtime, dtype and threads, in words."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        return f"PyTorch, {dtype}, {'GPU' if self.model.device.type == 'cuda' else _threads(torch.get_num_threads())}"

    @property
    def longest(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 20))

    def write(self, ids: list[int], tokens: int, told: Told) -> None:
        """Generate; see `Engine.write`."""
        prompt, streamer = torch.tensor([ids], device=self.model.device), _Streamer(self.tokenizer, told)
        own = self.tokenizer
        self.model.generate(
            inputs=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=own.eos_token_id if own.pad_token_id is None else own.pad_token_id,
            streamer=streamer,
            stopping_criteria=[_Stop(streamer)],
        )


class _Streamer(TextStreamer):
    """Text streamer that counts tokens, and hands pieces to a callback."""

    def __init__(self, tokenizer: Any, told: Told) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = False
        self._told, self._tokens = told, 0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        self._tokens += not self.next_tokens_are_prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the piece of text that a token completes, which may be empty."""
        self.stop = self._told(text, self._tokens)


class _Stop(StoppingCriteria):
    def __init__(self, streamer: _Streamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._streamer.stop, device=input_ids.device)


def _in_pytorch(which: str) -> Engine:
    at = shown()
    name, where = (at.pruned, {"revision": at.revision}) if which == "pruned" else (at.parent, {})
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else fast_dtype()
    _check_size(f"The {which} model", int(record()["parameters"][which]) * dtype.itemsize)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=which == "pruned", dtype=dtype, **where)
    except Exception as error:  # as above
        raise UnavailableError(cannot_be_loaded(name, error)) from error
    return _warm(TorchEngine(model.eval().to("cuda" if gpu else "cpu"), tokenizer()), gpu)


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it natively, else float32 (emulated bfloat16 is slower)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


# -- llama.cpp --------------------------------------------------------------------------------------------------------


class LlamaCppEngine:
    """A GGUF file in llama.cpp.

    Args:
        path: Path of the file, `model-DTYPE.gguf`.
    """

    def __init__(self, path: Path) -> None:
        from gguf import GGUFReader

        from exporters.to_gguf.llama_cpp import LlamaCpp

        fields = GGUFReader(path).fields
        trained = fields[f"{fields['general.architecture'].contents()}.context_length"].contents()
        self.longest = min(trained, LONGEST)
        self.dtype = path.stem.removeprefix("model-")
        self._model = LlamaCpp(path, self.longest)

    @property
    def runtime(self) -> str:
        """Runtime, dtype and threads, in words."""
        return f"llama.cpp, {self.dtype}, {_threads(self._model.threads)}"

    def write(self, ids: list[int], tokens: int, told: Told) -> None:
        """Generate; see `Engine.write`."""
        self._model.stream(ids, tokens, told)


@cache
def _in_llama_cpp() -> tuple[dict[str, Engine], str]:
    """Load both models in llama.cpp; return neither, and the reason, where that fails."""
    if shown().gguf is None or torch.cuda.is_available():
        return {}, ""
    try:
        return _converted(shown().gguf), ""
    except UnavailableError as error:
        logging.getLogger(__name__).warning("llama.cpp is not used: %s", error.__cause__ or error)
        return {}, str(error)


def _converted(name: str) -> dict[str, Engine]:
    """Load the published GGUF file, and the dense parent, which is converted to a file of the same dtype."""
    with _or_say("llama.cpp is not installed here."):
        import xllamacpp  # noqa: F401  LlamaCpp imports it

        from exporters.export import export
    with _or_say("The published GGUF file cannot be loaded."):
        path = shown().file(name)
        _check_size("The pruned model", path.stat().st_size)
        pruned = _warm(LlamaCppEngine(path))
    _check_size("For a conversion to GGUF, the dense model", int(record()["parameters"]["dense"]) * _FLOAT32)
    with (
        _or_say("The dense model cannot be converted to GGUF here."),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
    ):
        made = export(shown().parent, "gguf", Path(folder) / "gguf", dtype=pruned.dtype, tokenizer_from=str(path))
        return {"pruned": pruned, "dense": _warm(LlamaCppEngine(made / path.name))}  # llama.cpp maps the deleted file


@contextmanager
def _or_say(reason: str) -> Iterator[None]:
    """Turn any error into one that visitors may read."""
    try:
        yield
    except UnavailableError:
        raise
    except Exception as error:  # of the Hub's client, transformers, the exporters and llama.cpp
        raise UnavailableError(reason) from error


# -- the machine ------------------------------------------------------------------------------------------------------


def _warm(engine: Any, gpu: bool = False) -> Any:
    """Return the engine after a first pass, which is slow, except on a GPU that is given out for each request."""
    if not gpu:
        engine.write([1, 2, 3], 2, lambda text, tokens: False)
    return engine


def _threads(number: int) -> str:
    return f"{number} {'thread' if number == 1 else 'threads'}"


def _check_size(model: str, weights: float) -> None:
    """Refuse a model, named in words, whose weights in bytes leave too little memory to run it."""
    needed = weights * _GROWTH
    there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else _memory_left()
    if needed > there:
        raise UnavailableError(
            f"{model} is too large for this machine: it needs about {needed / 1e9:.1f} GB of memory, and "
            f"{there / 1e9:.1f} GB are left."
        )


def _memory_left() -> float:
    """Return the free memory in bytes: that of the machine, or of the container where that is less."""
    left = float(psutil.virtual_memory().available)
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(left, float(limit) - float(used))
    except (OSError, ValueError):  # no container, or one without a limit
        return left
