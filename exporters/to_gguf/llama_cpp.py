"""llama.cpp in this process: GGUF files run, timed and compared with PyTorch."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters import machine
from exporters.writer import require
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.errors import ExportError, ModelError

PROMPTS = (24, 9, 1)
"""Lengths of the prompts of a comparison, in tokens."""
STEPS = 5
LIKELIEST = 64
"""Tokens whose log-probabilities are compared at each step: llama.cpp's likeliest."""
PROBE = (
    "In 1984 the café's 3,141 guests didn't say: \"It's 50% off!\"\n\n  They'd ask\tfor naïve Überraschungen, "
    "漢字とかな, Привет мир and 🚀🙂.\r\n    return x != 10_000;  "
)
"""Text on which the tokenizers are compared."""


class LlamaCpp:
    """A GGUF file behind llama.cpp's server, one sequence at a time, without a cache of prompts.

    Args:
        path: The file.
        context: Longest sequence, in tokens.
        threads: Of the CPU; None takes as many as PyTorch does, of those that this process may use.
        exact: Keep keys and values in float32, and attend in float32; llama.cpp's flash attention rounds to float16.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        ModelError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None, *, exact: bool = False) -> None:
        require("xllamacpp", "gguf")
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads or machine.threads()
        parameters.cache_prompt, parameters.cache_ram_mib = False, 0
        parameters.verbosity = -1
        parameters.endpoint_metrics = True
        if exact:
            parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(parameters)
        except Exception as error:  # xllamacpp raises bare RuntimeErrors
            raise ModelError(f"llama.cpp cannot load {str(path)!r}.", "Export the model again.") from error
        # The server's thread enters its loop after the constructor has returned. A server that is destroyed before that
        # waits for ever for the loop to end. What the loop answers tells that it is running.
        self._server.handle_metrics()

    def complete(self, prompt: Sequence[int], new_tokens: int, **options: Any) -> dict[str, Any]:
        """Write greedy tokens after a prompt.

        Args:
            prompt: Token ids.
            new_tokens: How many are written, unless an end-of-text token comes first.
            **options: Of llama.cpp's completion requests, such as `ignore_eos` and `n_probs`.

        Returns:
            llama.cpp's reply: `choices`, and `timings` (`prompt_ms`, `predicted_ms`, `predicted_n`, …).
        """
        request = {"prompt": list(prompt), "n_predict": new_tokens, "samplers": ["top_k"], "top_k": 1}
        return dict(self._server.handle_completions({**request, "cache_prompt": False, **options}))

    def tokenize(self, text: str) -> list[int]:
        """Read text as token ids, with the special tokens that the file's tokenizer adds."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return list(json.load(reply)["tokens"])


@dataclass(frozen=True)
class Answer:
    """What the PyTorch model says after some tokens."""

    ids: list[int]
    log_probabilities: Tensor
    """Of the next token, float32, `[V]`."""


@torch.inference_mode()
def answers(model: PreTrainedModel, longest: int) -> list[Answer]:
    """Let the PyTorch model write text, and take greedy steps after the beginnings of it.

    Args:
        model: The PyTorch model.
        longest: Tokens as far as which llama.cpp computes the same function.

    Returns:
        Its answers, `STEPS` for each of the prompts.
    """
    texts = sample_windows(model, len(PROMPTS), min(max(PROMPTS), longest - STEPS), seed=0).tolist()
    told = []
    for length, text in zip(PROMPTS, texts, strict=True):
        ids = text[:length]
        for _ in range(STEPS):
            told.append(Answer(ids, model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)))
            ids = [*ids, int(told[-1].log_probabilities.argmax())]
    return told


def log_probability_difference(
    told: list[Answer], path: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> float:
    """Compare a GGUF file, as llama.cpp runs it, with what the PyTorch model said.

    Args:
        told: Of `answers`.
        path: The file.
        tokenizer: Compared with the file's on a text, too; None where the file's is known to differ.

    Returns:
        The largest distance between two log-probabilities of a token.

    Raises:
        ExportError: llama.cpp reads the text as other tokens.
    """
    run = LlamaCpp(path, max(PROMPTS) + STEPS + 8, exact=True)
    if tokenizer is not None and run.tokenize(PROBE) != tokenizer(PROBE)["input_ids"]:
        raise ExportError(
            "llama.cpp's tokenizer reads text as other tokens than the model's does.",
            "Give the parent's GGUF file as tokenizer_from, or export to onnx.",
        )
    differences: list[float] = []
    for answer in told:
        # One token a request, each on the cache of the last one: in a longer reply, llama.cpp leaves out tokens
        # that end within a character.
        reply = run.complete(answer.ids, 1, n_probs=LIKELIEST, cache_prompt=True)["choices"][0]["logprobs"]
        steps = reply["content"] if reply else []
        found = [(entry["id"], entry["logprob"]) for step in steps for entry in step["top_logprobs"]]
        differences += [abs(answer.log_probabilities[index].item() - value) for index, value in found]
    return max(differences) if differences and all(map(math.isfinite, differences)) else math.nan
