"""The two models, and their answers as a stream, with the measured speed of each."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any

import psutil
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, TextIteratorStreamer

try:  # Hugging Face's package on a ZeroGPU Space; elsewhere the import may find this folder itself
    from spaces import GPU
except ImportError:

    def GPU(duration: int) -> Callable[[Any], Any]:
        """Return the function unchanged: there is no GPU to request."""
        return lambda function: function


LONGEST_PROMPT = 2_000
"""Maximum length of a prompt, in characters."""
MOST_TOKENS = 256
SECONDS = 60
"""Time limit for the answer of one model, in seconds."""
_GROWTH = 1.3
"""Memory of a model during generation, as a multiple of its weights."""


class UnavailableError(Exception):
    """A visitor gets no answer; the message says why."""


@dataclass(frozen=True)
class Shown:
    """The model that the page shows."""

    pruned: str
    """Directory or Hub repository of the pruned model."""
    revision: str | None
    dense: str | None
    """Directory or Hub repository of the dense parent; None uses the one that the record names."""

    def file(self, name: str) -> Path:
        """Return the path of a file of the pruned model, which is downloaded if necessary."""
        local = Path(self.pruned)
        return local / name if local.is_dir() else Path(hf_hub_download(self.pruned, name, revision=self.revision))

    @property
    def parent(self) -> str:
        """Directory or Hub repository of the dense model."""
        return self.dense or str(record()["base_model"])


@cache
def shown() -> Shown:
    """Read which model is shown, from the environment or from `model.json` beside the app, which publishing writes."""
    path = Path(__file__).with_name("model.json")
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    name = os.environ.get("PRUNED_MODEL") or written.get("pruned")
    if not name:
        raise UnavailableError(
            "Set PRUNED_MODEL to a model made with selfpruner-hub (a Hub repository or a directory)."
        )
    revision = os.environ.get("PRUNED_REVISION") or written.get("revision")
    return Shown(name, revision, os.environ.get("DENSE_MODEL"))


@cache
def record() -> dict[str, Any]:
    """Read `selfpruner.json` of the pruned model."""
    try:
        return json.loads(shown().file("selfpruner.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnavailableError(_why(shown().pruned, error)) from error


def _why(name: str, error: Exception) -> str:
    """Return a message for visitors about a model that does not load, without paths of this machine."""
    called = Path(name).name if Path(name).is_dir() else name
    status = (
        getattr(getattr(error, "response", None), "status_code", None) if isinstance(error, HfHubHTTPError) else None
    )
    reason = {401: "it is private or gated", 403: "it is gated", 404: "it is not on the Hub"}.get(status or 0)
    return f"The model {called} cannot be loaded: {reason or 'it is missing, damaged or out of reach'}."


# -- loading ----------------------------------------------------------------------------------------------------------

_loading = threading.Lock()


def load(which: str) -> tuple[Any, Any]:
    """Load the model `pruned` or `dense`, and the pruned model's tokenizer, which is the parent's."""
    with _loading:  # two visitors share one download
        return _load(which)


@cache
def _load(which: str) -> tuple[Any, Any]:
    at = shown()
    name, where = (at.pruned, {"revision": at.revision}) if which == "pruned" else (at.parent, {})
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else fast_dtype()
    _check_size(which, int(record()["parameters"][which]) * dtype.itemsize * _GROWTH)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=which == "pruned", dtype=dtype, **where)
        # transformers reads config.json first, and without trust_remote_code it would ask on the terminal
        tokenizer = AutoTokenizer.from_pretrained(at.pruned, revision=at.revision, trust_remote_code=True)
    except Exception as error:  # transformers and the Hub's client share no base class
        raise UnavailableError(_why(name, error)) from error
    if gpu:
        return model.eval().to("cuda"), tokenizer
    start = torch.tensor([[1, 2, 3]])  # the first pass is slow, so it is run before a visitor asks
    model.eval().generate(start, attention_mask=torch.ones_like(start), max_new_tokens=2, do_sample=False)
    return model, tokenizer


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it natively, else float32 (emulated bfloat16 is slower)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _check_size(which: str, needed: float) -> None:
    there = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else _memory_left()
    if needed > there:
        raise UnavailableError(
            f"The {which} model is too large for this machine: it needs about {needed / 1e9:.1f} GB of memory, and "
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


# -- answering --------------------------------------------------------------------------------------------------------


@dataclass
class Answer:
    """The part of an answer that is written, and its timing."""

    text: str = ""
    tokens: int = 0
    first: float | None = None
    """Time from the request to the first token, in seconds; None before that."""
    seconds: float = 0.0
    done: bool = False

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first token; None with fewer than two tokens."""
        writing = self.seconds - (self.first or 0.0)
        return (self.tokens - 1) / writing if self.tokens > 1 and writing > 0 else None

    def took(self) -> str:
        """Return the rate, the time to the first token and the number of tokens, as Markdown."""
        if self.first is None:
            return "reading the prompt …"
        rate = f"**{self.rate:.1f}** tokens/s · " if self.rate else ""
        return f"{rate}first token after **{self.first:.2f} s** · {self.tokens} tokens"


class _Streamer(TextIteratorStreamer):
    """Text streamer that counts and times tokens."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, timeout=SECONDS, skip_special_tokens=True)
        self.answer = Answer()
        self.error: Exception | None = None
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        if not self.next_tokens_are_prompt:
            self.answer.tokens += 1
            self.answer.seconds = time.perf_counter() - self._started
            self.answer.first = self.answer.first or self.answer.seconds
        super().put(value)


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


@GPU(duration=SECONDS)
def answer(which: str, prompt: str, tokens: int) -> Iterator[Answer]:
    """Generate the answer of one model.

    Args:
        which: Name of the model, `pruned` or `dense`.
        prompt: Prompt that a visitor typed.
        tokens: Maximum number of tokens to write.

    Yields:
        The answer so far, after each piece of text.

    Raises:
        UnavailableError: The model cannot be loaded, fails or takes too long, or the prompt is too long for it.
    """
    model, tokenizer = load(which)
    inputs = encode(tokenizer, prompt).to(model.device)
    room = int(getattr(model.config, "max_position_embeddings", 1 << 20)) - inputs["input_ids"].shape[1]
    if room < 1:
        raise UnavailableError("The prompt is longer than the model can read. Shorten it.")
    stop, streamer = threading.Event(), _Streamer(tokenizer)
    settings = {
        "max_new_tokens": min(tokens, room, MOST_TOKENS),
        "max_time": SECONDS,
        "do_sample": False,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "streamer": streamer,
        "stopping_criteria": [_Stop(stop)],
    }

    def write() -> None:
        try:
            model.generate(**inputs, **settings)
        except Exception as error:
            streamer.error = error
            streamer.end()

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    try:
        yield streamer.answer
        for piece in streamer:
            streamer.answer.text += piece
            yield streamer.answer
        if streamer.error is not None:
            raise UnavailableError(f"The {which} model failed ({type(streamer.error).__name__}).")
        streamer.answer.done = True
        yield streamer.answer
    except Empty:
        raise UnavailableError(f"The {which} model wrote nothing for {SECONDS} s. Try again later.") from None
    finally:  # also when the visitor has left
        stop.set()
        writer.join()


def encode(tokenizer: Any, prompt: str) -> Any:
    """Encode a prompt, through the chat template where the tokenizer has one."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt", add_special_tokens=False)
