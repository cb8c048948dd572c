"""The dense model behind a server, which writes its text much faster than a process that streams its layers."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeVar

import httpx2
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import encoded
from selfpruner_hub.calibration.text_sources import start_ids
from selfpruner_hub.endpoint import Endpoint, check_writer
from selfpruner_hub.errors import EndpointError, UserError
from selfpruner_hub.models.forward import head_chunks

_T = TypeVar("_T")
AT_ONCE = 64
"""Maximum number of parallel requests; servers of this kind batch them."""
TIMEOUT = 600.0
"""Time limit of one request in seconds, waiting for its turn included."""
PROBES = (
    "The capital of France is",
    "Water boils at a temperature of",
    "def factorial(n):\n",
    "In the year 1969, two astronauts",
    "A list of animals that live in the sea:",
    "The most important thing about a good book is",
)
"""Beginnings of plain text that both models go on with."""
PROBE_TOKENS = 32
"""Number of tokens after each of `PROBES`."""
ALIKE = 0.85
"""Least share of the tokens that the server writes, greedily, which the model finds likeliest too. Other kernels and
weights of few bits change a few in a hundred; another model, or a pruned copy, far more."""


class ServedModel:
    """The dense model behind an OpenAI-compatible server that takes token ids, such as vLLM and llama.cpp.

    It stands in place of the model where text is written (`generated_text.continuations`). The prompts are sent as
    token ids, so that the template's own tokens are read. A server that returns no token ids returns text, which is
    tokenized again. Before its first text, it must write what the model itself would.

    Args:
        model: The dense model.
        tokenizer: Its tokenizer.
        url: Base URL, as for `endpoint.Endpoint`.
        name: Name of the model at the server; None takes the only one that it serves.
        environment: Variables in which the key is looked up; None uses the process's environment.

    Raises:
        UserError: The URL is malformed, or there is no tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        url: str,
        name: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if tokenizer is None:
            raise UserError("A server that writes the text needs the model's tokenizer, and there is none.")
        self.config = model.config
        self.generation_config = getattr(model, "generation_config", None)
        self._model, self._tokenizer = model, tokenizer
        self._endpoint = Endpoint(url, environment)
        limits = httpx2.Limits(max_connections=AT_ONCE)
        headers = {"Authorization": f"Bearer {self._endpoint.key}"} if self._endpoint.key else {}
        self._client = httpx2.Client(timeout=TIMEOUT, limits=limits, headers=headers)
        weakref.finalize(self, self._client.close)
        self._name = name or ""
        self._checked = self._gives_ids = False

    def continuations(
        self,
        prompts: Sequence[Sequence[int]],
        most: int,
        *,
        ends: Collection[int],
        banned: Collection[int],
        temperature: float,
        seed: int,
        report: Callable[[int], None],
    ) -> list[list[int]]:
        """Let the server go on with each prompt; arguments and result are those of `generated_text.continuations`.

        Args:
            prompts: Token ids, at least one per prompt.
            most: Maximum number of new tokens per prompt.
            ends: Token ids that end a continuation; the continuation includes them.
            banned: Token ids that are never generated.
            temperature: Temperature of sampling without truncation; 0 takes the likeliest token.
            seed: Random seed; what it gives depends on the server.
            report: Function that is called with the number of prompts that are done.

        Returns:
            New token ids of each prompt, in the order of the prompts.

        Raises:
            UserError: The server serves another model, or several, or refuses the key.
            EndpointError: It refuses a request, does not answer, or writes nothing.
        """
        if not self._checked:
            self._check()
            self._checked = True
        spare = 0 if ends or self._gives_ids else most // 4 + 8  # text may come back in fewer tokens
        every: dict[str, Any] = {"max_tokens": most + spare, "temperature": temperature}
        if banned:  # the server has the end of the tokenizer too, whatever the model's configuration says
            every["logit_bias"] = {str(token): -100 for token in {*banned, self._tokenizer.eos_token_id}}
        draw = random.Random(seed)
        bodies = [{"prompt": list(prompt), "seed": draw.getrandbits(31), **every} for prompt in prompts]
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            futures = [pool.submit(self._written, body, most, ends) for body in bodies]
            for number, future in enumerate(as_completed(futures), 1):
                future.result()
                report(number)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error or an interrupt, the rest is not asked for
        return [future.result() for future in futures]

    def _written(self, body: dict[str, Any], most: int, ends: Collection[int]) -> list[int]:
        """At most `most` token ids that the server writes after one prompt, up to the first that ends them."""
        # The model's own distribution: servers truncate and punish repetition by default, each under its own names.
        plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0}
        asked = {"model": self._name, "return_token_ids": True, "add_special_tokens": False, **plain, **body}
        choice, ids = self._sent(self._read, "POST", "/completions", asked)
        if choice.get("finish_reason") == "stop":
            reason = choice.get("stop_reason")  # the id of a token that ended it, if that is not the usual one
            end = reason if isinstance(reason, int) else self._tokenizer.eos_token_id
            ids = ids if end in ids[-1:] else [*ids, end]
        ids = ids[:most]
        if len(ids) < (most if "logit_bias" in body else 1):
            raise EndpointError("The endpoint wrote nothing, or ended a text that has no end.")
        return ids[: next((count for count, token in enumerate(ids, 1) if token in ends), len(ids))]

    def _read(self, answer: Any) -> tuple[dict[str, Any], list[int]]:
        """What the server says of the only text in its answer, and the token ids of this text."""
        (choice,) = answer["choices"]
        ids = choice.get("token_ids")
        self._gives_ids = ids is not None
        return choice, encoded(self._tokenizer, choice["text"]) if ids is None else list(map(int, ids))

    def _check(self) -> None:
        """Raise unless the server writes what the model finds likeliest."""
        self._name = self._name or self._only_model()
        start = start_ids(self._tokenizer)
        prompts = [[*start, *encoded(self._tokenizer, text)] for text in PROBES]
        greedy: dict[str, Any] = {"max_tokens": PROBE_TOKENS, "temperature": 0.0, "seed": 0}
        with ThreadPoolExecutor(len(prompts)) as pool:
            written = list(
                pool.map(lambda prompt: self._written({"prompt": prompt, **greedy}, PROBE_TOKENS, ()), prompts)
            )
        share = _likeliest(self._model, prompts, written)
        if share < ALIKE:
            raise UserError(
                f"{self._endpoint.host} does not serve this model: of the tokens that {self._name!r} writes there, the "
                f"model itself finds {share:.0%} likeliest.",
                "Serve the very model that is given here, in bfloat16, float16 or 8 bits.",
            )

    def _only_model(self) -> str:
        """The name of the only model that is served."""
        names = self._sent(lambda answer: [str(each["id"]) for each in answer["data"]], "GET", "/models")
        if len(names) != 1:
            raise UserError(
                f"{self._endpoint.host} serves {len(names)} models.", "Name one: writer_model (--writer-model)."
            )
        return names[0]

    def _sent(self, read: Callable[[Any], _T], method: str, path: str, body: dict[str, Any] | None = None) -> _T:
        """Send a request and read its answer."""

        def send() -> _T:
            answer = self._client.request(method, f"{self._endpoint.url}{path}", json=body)
            return read(answer.raise_for_status().json())

        return self._endpoint.tried(send, self._name)


@torch.inference_mode()
def _likeliest(model: PreTrainedModel, prompts: Sequence[Sequence[int]], written: Sequence[Sequence[int]]) -> float:
    """The share of the tokens that were written after prompts which the model finds likeliest; it runs once."""
    rows = [[*prompt, *new] for prompt, new in zip(prompts, written, strict=True)]
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]  # no token attends to what follows it
    ids = torch.tensor(padded, device=model.device)
    hidden = model.get_decoder()(ids, use_cache=False).last_hidden_state
    right = total = 0
    for states, row, prompt in zip(hidden, rows, prompts, strict=True):
        logits = torch.cat([block for _, block in head_chunks(model, states[len(prompt) - 1 : len(row) - 1])])
        right += sum(a == b for a, b in zip(logits.argmax(-1).tolist(), row[len(prompt) :], strict=True))
        total += len(row) - len(prompt)
    return right / total


def served_by(
    url: str | None, name: str | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> ServedModel | None:
    """The model behind the server that is given; None without one, and raises `UserError` for a name alone."""
    check_writer(url, name)
    return None if url is None else ServedModel(model, tokenizer, url, name)
