"""Run GGUF files with llama.cpp in this process, time them, and compare them with PyTorch."""

from __future__ import annotations

import json
import math
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exporters import machine
from exporters.parity import PROMPT_LENGTHS, likely
from exporters.writer import require
from selfpruner_hub.calibration.generated_text import sample_windows
from selfpruner_hub.errors import ExportError, ModelError

GREEDY_STEPS = 5
LIKELIEST = 64
"""Number of llama.cpp's likeliest tokens whose log-probabilities are compared at each step."""
MOST = 16
"""Most tokens that are compared at each step where weights are rounded."""
PROBE = (
    "In 1984 the café's 3,141 guests didn't say: \"It's 50% off!\"\n\n  They'd ask\tfor naïve Überraschungen, "
    "漢字とかな, Привет мир and 🚀🙂.\r\n    return x != 10_000;  "
)
"""Text on which the tokenizers are compared."""


class LlamaCpp:
    """A GGUF file in llama.cpp's server, one sequence at a time, without a prompt cache.

    Args:
        path: Path of the GGUF file.
        context: Length of the longest sequence, in tokens.
        threads: Number of CPU threads; None takes PyTorch's number, at most the cores that this process may use.
        exact: Flag for a KV cache and attention in float32; llama.cpp's flash attention rounds to float16.

    Raises:
        MissingExtraError: xllamacpp is not installed.
        ModelError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path, context: int, threads: int | None = None, *, exact: bool = False) -> None:
        require("xllamacpp", "gguf")
        import xllamacpp

        self.threads = threads or machine.usable_threads()
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.n_parallel = context, 1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self.threads
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
        """Generate greedy tokens after a prompt.

        Args:
            prompt: Token ids of the prompt.
            new_tokens: Number of new tokens; an end-of-text token stops earlier.
            **options: Options of llama.cpp's completion requests, such as `ignore_eos` and `n_probs`.

        Returns:
            llama.cpp's reply: `choices`, and `timings` (`prompt_ms`, `predicted_ms`, `predicted_n`, …).

        Raises:
            ModelError: llama.cpp refuses the request or fails.
        """
        return _answered(dict(self._server.handle_completions(_greedy(prompt, new_tokens, **options))))

    def stream(self, prompt: Sequence[int], new_tokens: int, receiver: Callable[[str, int], bool]) -> None:
        """Generate greedy tokens after a prompt, and hand them to a callback one by one.

        Args:
            prompt: Token ids of the prompt.
            new_tokens: Number of new tokens; an end-of-text token stops earlier.
            receiver: Callback with each piece of text and the number of tokens so far; it returns whether to stop. A
                piece that ends within a character waits for the next token. An error in it stops the tokens, and is
                raised.

        Raises:
            ModelError: llama.cpp refuses the request or fails.
        """
        failed: list[Exception] = []

        def receive(reply: dict[str, Any]) -> bool:
            try:
                _answered(reply)
                return receiver(reply["choices"][0]["text"], reply["timings"]["predicted_n"])
            except Exception as error:  # xllamacpp would drop it
                failed.append(error)
                return True

        self._server.handle_completions(_greedy(prompt, new_tokens, stream=True, timings_per_token=True), receive)
        if failed:
            raise failed[0]

    def likeliest(self, ids: Sequence[int]) -> dict[int, float]:
        """Return the log-probabilities of the likeliest next tokens.

        One token per request, on the cache of the last request: in longer replies, llama.cpp leaves out tokens that end
        within a character.

        Args:
            ids: Token ids so far.

        Returns:
            Log-probability by token, `LIKELIEST` of them, likeliest first; nothing where llama.cpp has no finite ones.
        """
        reply = self.complete(ids, 1, n_probs=LIKELIEST, cache_prompt=True)["choices"][0]["logprobs"]
        steps = reply["content"] if reply else []
        return {entry["id"]: entry["logprob"] for step in steps for entry in step["top_logprobs"]}

    def tokenize(self, text: str) -> list[int]:
        """Tokenize text, with the special tokens that the file's tokenizer adds."""
        body = json.dumps({"content": text, "add_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return list(json.load(reply)["tokens"])


def _answered(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply of llama.cpp; raise `ModelError` with its message where it has no answer."""
    if "choices" not in reply:
        message = reply.get("error", reply).get("message", "it does not say why")
        raise ModelError(f"llama.cpp does not run the model: {message}.")
    return reply


def _greedy(prompt: Sequence[int], new_tokens: int, **options: Any) -> dict[str, Any]:
    """Return a completion request for the likeliest tokens after a prompt."""
    request = {"prompt": list(prompt), "n_predict": new_tokens, "samplers": ["top_k"], "top_k": 1}
    return {**request, "cache_prompt": False, **options}


@dataclass(frozen=True)
class GreedyStep:
    """The PyTorch model's log-probabilities after some tokens."""

    ids: list[int]
    log_probabilities: Tensor
    """Log-probabilities of the next token, float32, `[V]`."""


@torch.inference_mode()
def greedy_steps(model: PreTrainedModel, longest: int) -> list[GreedyStep]:
    """Let the PyTorch model generate texts, and record greedy steps after their first tokens.

    Args:
        model: PyTorch model.
        longest: Longest sequence for which llama.cpp computes the same function, in tokens.

    Returns:
        The steps, `GREEDY_STEPS` for each prompt.
    """
    window = min(max(PROMPT_LENGTHS), longest - GREEDY_STEPS)
    texts = sample_windows(model, len(PROMPT_LENGTHS), window, seed=0).tolist()
    steps = []
    for length, text in zip(PROMPT_LENGTHS, texts, strict=True):
        ids = text[:length]
        for _ in range(GREEDY_STEPS):
            steps.append(GreedyStep(ids, model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)))
            ids = [*ids, int(steps[-1].log_probabilities.argmax())]
    return steps


def log_probability_difference(
    steps: list[GreedyStep], path: Path, tokenizer: PreTrainedTokenizerBase | None = None, rounded: bool = False
) -> float:
    """Compare log-probabilities of a GGUF file in llama.cpp with the PyTorch model's.

    Rounded weights move unlikely tokens far, by 8 nats in q4_0 of SmolLM2, and that adds almost nothing to the KL
    divergence. So tokens that are likely in PyTorch are compared for them.

    Args:
        steps: Steps of the PyTorch model, from `greedy_steps`.
        path: Path of the GGUF file.
        tokenizer: Tokenizer to compare with the file's on `PROBE`; None leaves that comparison out.
        rounded: Flag of a file in blocks: compares tokens that are likely in PyTorch, not llama.cpp's likeliest. One
            that is not among llama.cpp's likeliest counts as the last of them.

    Returns:
        The largest absolute difference between log-probabilities of a token; NaN if any is not finite.

    Raises:
        ExportError: llama.cpp splits the text into other tokens.
    """
    run = LlamaCpp(path, max(PROMPT_LENGTHS) + GREEDY_STEPS + 8, exact=True)
    if tokenizer is not None:
        check_tokens(run, tokenizer, PROBE)
    return gguf_difference(steps, run, rounded)


def check_tokens(run: LlamaCpp, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Raise `ExportError` if llama.cpp splits a text into other tokens than the model's tokenizer does."""
    if run.tokenize(text) != tokenizer(text)["input_ids"]:
        raise ExportError(
            "llama.cpp's tokenizer reads text as other tokens than the model's does.",
            "Give the parent's GGUF file as tokenizer_from, or export to onnx.",
        )


def gguf_difference(steps: list[GreedyStep], run: LlamaCpp, rounded: bool = False) -> float:
    """Compare log-probabilities with the PyTorch model's; see `log_probability_difference`.

    Args:
        steps: Steps of the PyTorch model.
        run: GGUF file, in a context that is longer than the tokens of every step.
        rounded: Flag of a file in blocks.

    Returns:
        The largest absolute difference between log-probabilities of a token; NaN if any is not finite.
    """
    differences: list[float] = []
    for step in steps:
        theirs = run.likeliest(step.ids)
        if rounded and theirs:
            values, indices = step.log_probabilities.topk(MOST)
            compared = indices[likely(values)].tolist()
            theirs = {index: theirs.get(index, min(theirs.values())) for index in compared}
        differences += [abs(step.log_probabilities[index].item() - value) for index, value in theirs.items()]
    return max(differences) if differences and all(map(math.isfinite, differences)) else math.nan
