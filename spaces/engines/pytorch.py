"""The two models in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from model_source import UnavailableError, cannot_be_loaded, record, shown
from tokens import tokenizer
from transformers import AutoModelForCausalLM, StoppingCriteria, TextStreamer

from engines.base import Engine, Receive, check_size, threads_text, warm


@dataclass(frozen=True)
class Generating:
    """A model with transformers' `generate()`, and its tokenizer."""

    model: Any
    tokenizer: Any
    runtime: str
    """Runtime, dtype and threads, in words."""

    @property
    def longest(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return int(getattr(self.model.config, "max_position_embeddings", 1 << 20))

    def write(self, ids: list[int], tokens: int, receive: Receive) -> None:
        """Generate; see `Engine.write`."""
        prompt, streamer = torch.tensor([ids], device=self.model.device), _Streamer(self.tokenizer, receive)
        tokenizer = self.tokenizer
        self.model.generate(
            inputs=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            streamer=streamer,
            stopping_criteria=[_Stop(streamer)],
        )


class _Streamer(TextStreamer):
    """Text streamer that counts tokens, and hands pieces to a callback."""

    def __init__(self, tokenizer: Any, receive: Receive) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.stop = False
        self._receive, self._tokens = receive, 0

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, then one token at a time."""
        self._tokens += not self.next_tokens_are_prompt
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the piece of text that a token completes, which may be empty."""
        self.stop = self._receive(text, self._tokens)


class _Stop(StoppingCriteria):
    def __init__(self, streamer: _Streamer) -> None:
        self._streamer = streamer

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._streamer.stop, device=input_ids.device)


def load(which: str) -> Engine:
    """Load the model `pruned` or `dense`, on a GPU where there is one."""
    at = shown()
    name, revision = (at.pruned, at.revision) if which == "pruned" else (at.parent, at.parent_revision)
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else fast_dtype()
    check_size(f"The {which} model", int(record()["parameters"][which]) * dtype.itemsize)
    try:
        how = {"revision": revision, "trust_remote_code": which == "pruned", "dtype": dtype}
        model = AutoModelForCausalLM.from_pretrained(name, **how).eval().to("cuda" if gpu else "cpu")
    except Exception as error:  # as above
        raise UnavailableError(cannot_be_loaded(name, error)) from error
    where_it_runs = "GPU" if gpu else threads_text(torch.get_num_threads())
    runtime = f"PyTorch, {str(dtype).removeprefix('torch.')}, {where_it_runs}"
    return warm(Generating(model, tokenizer(), runtime), gpu)


def fast_dtype() -> torch.dtype:
    """Return bfloat16 where this CPU multiplies it natively, else float32 (emulated bfloat16 is slower)."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
