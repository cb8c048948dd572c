"""A language model behind an OpenAI-compatible endpoint as proposer (OpenAI, HF Providers, vLLM, Ollama)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from huggingface_hub import InferenceClient

from selfpruner_hub.endpoint import Endpoint
from selfpruner_hub.errors import EndpointError, UserError
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.search.llm import prompts, reply_schema
from selfpruner_hub.search.llm.question import Question
from selfpruner_hub.search.proposers import Operation, Proposal, Scored
from selfpruner_hub.settings import EndpointOptions

BEHIND = " behind an OpenAI-compatible endpoint"
"""End of the proposer's name in journal, record and card; the name of the model is before it."""
_AT_ONCE = 4
"""Maximum number of parallel requests."""


class EndpointProposer:
    """Asks a chat model over HTTP, one request per child, under a JSON schema where the server supports one.

    Args:
        url: Base URL, as for `endpoint.Endpoint`, which finds the key.
        model: Name of the model at the endpoint.
        budget: Parameter budget of the search.
        subject: Name of the model that is being pruned, for the prompt.
        options: Temperature, prompt templates, limits of the requests (retries included) and of the tokens read and
            written (as the server counts them), and their price.
        timeout: Time limit of one request, in seconds.
        environment: Variables in which the key is looked up; None uses the process's environment.

    Raises:
        UserError: The URL is malformed, or no model is named.
    """

    reads_slopes = True

    def __init__(
        self,
        url: str,
        model: str | None,
        budget: Budget,
        subject: str,
        options: EndpointOptions,
        *,
        timeout: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._endpoint = Endpoint(url, environment)
        if not model:
            raise UserError(
                "A proposer behind an endpoint needs the name of its model.", "Pass proposer_model (--proposer-model)."
            )
        self.name = f"{model}{BEHIND}"  # no address: its path or query may hold a key, and its host be internal
        self._model = model
        self._budget = budget
        self._subject = subject
        self.options = options
        self.token_price = options.token_price
        self._requests = self._tokens = 0
        # Without a key the client would send the user's Hub token to whatever host this is.
        self._client = _Client(base_url=url, api_key=self._endpoint.key or "none", timeout=timeout)

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Ask for `count` proposals with one prompt.

        Args:
            operation: Kind of proposal.
            history: Scored plans, best first.
            count: Number of proposals.
            rng: Random generator for the seeds of the requests.

        Returns:
            One proposal per request; a request that failed after all retries becomes a refusal.

        Raises:
            UserError: The endpoint refuses the key, or has no such model.
        """
        question = Question(operation, history, self._budget)
        prompt = prompts.render(question, self._subject, self.options.template_directory)
        schema = reply_schema.schema(question)
        seeds = [int(seed) for seed in rng.integers(2**31, size=count)]

        def one(seed: int) -> Proposal:
            try:
                reply, tokens = self._request(request(self._model, prompt, schema, self.options.temperature, seed))
            except EndpointError as error:
                return Proposal(None, prompt=prompt, error=str(error))
            return reply_schema.proposal(question, prompt, reply, tokens)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(one, seeds))

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history in the prompt holds them."""

    def resume(self, proposals: Sequence[Proposal]) -> None:
        """Count on from the proposals that the journal of a search has of this proposer; it has no retries."""
        self._requests, self._tokens = len(proposals), sum(proposal.tokens for proposal in proposals)

    def _request(self, arguments: dict[str, Any]) -> tuple[str, int]:
        """Send one request, with its retries, each of which counts."""

        def send() -> tuple[str, int]:
            if self._requests >= self.options.request_limit or self._tokens >= self.options.token_limit:
                raise EndpointError("The limit of requests or tokens is reached.")
            self._requests += 1
            answer = self._client.chat_completion(**arguments)
            tokens = int(answer.usage.total_tokens or 0) if answer.usage else 0
            self._tokens += tokens
            return str(answer.choices[0].message.content or ""), tokens

        return self._endpoint.tried(send, self._model)


class _Client(InferenceClient):
    """Sends the schema in the OpenAI form.

    For a URL the base class rewrites it to the old form of text-generation-inference, which other servers ignore.
    """

    def _inner_post(self, request_parameters: Any, *, stream: bool = False) -> Any:
        sent = request_parameters.json.get("response_format", {})
        if "value" in sent:
            schema = {"name": "pruning_rates", "schema": sent["value"], "strict": True}
            request_parameters.json["response_format"] = {"type": "json_schema", "json_schema": schema}
        return super()._inner_post(request_parameters, stream=stream)


def request(model: str, prompt: str, schema: Mapping[str, Any], temperature: float, seed: int) -> dict[str, Any]:
    """Arguments of `InferenceClient.chat_completion` for one reply under a JSON schema.

    Args:
        model: Name of the model at the endpoint.
        prompt: Text of the user's message.
        schema: JSON schema of the reply.
        temperature: Sampling temperature.
        seed: Random seed of sampling, where the server supports one.

    Returns:
        Keyword arguments.
    """
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": temperature,
        "seed": seed,
        "max_tokens": 2_048 + 2 * len(json.dumps(reply_schema.example(schema))),
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "pruning_rates", "schema": schema, "strict": True},
        },
    }
