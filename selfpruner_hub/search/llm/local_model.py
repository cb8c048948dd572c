"""A local language model as proposer: it writes rates under a JSON schema, several children at once."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selfpruner_hub.calibration.chat_template import prompt_ids
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.devices import fork_rng
from selfpruner_hub.models.patching import attending_by_group
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.search.llm import prompts, reply_schema
from selfpruner_hub.search.llm.question import Question
from selfpruner_hub.search.proposers import Operation, Proposal, Scored
from selfpruner_hub.settings import LanguageModelOptions

CACHE_MEMORY = 0.75
"""Memory limit of the KV caches of a batch of replies, as a multiple of the model's weights."""


class ModelProposer:
    """Asks a transformers model, such as the dense model that is being pruned (`name="self"`).

    Decoding is constrained to the reply's schema, so that even a small model only answers with well-formed rates.
    The prompt is encoded once for all children of an ask.

    Args:
        model: Causal language model that proposes.
        tokenizer: Fast tokenizer of the model; its chat template is used where it has one.
        budget: Parameter budget of the search.
        subject: Name of the model that is being pruned, for the prompt.
        options: Temperature and prompt templates.
        name: Name of the proposer in the journal.

    Raises:
        UserError: Decoding with this tokenizer cannot be constrained.
    """

    reads_slopes = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        budget: Budget,
        subject: str,
        options: LanguageModelOptions,
        *,
        name: str = "self",
    ) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._budget = budget
        self._subject = subject
        self.options = options
        try:
            self._grammar_tokens = llguidance.hf.from_tokenizer(tokenizer, n_vocab=model.config.vocab_size)  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError("The model's tokenizer cannot be constrained.", 'Use proposer="evolution".') from error

    def ask(
        self, operation: Operation, history: Sequence[Scored], count: int, rng: np.random.Generator
    ) -> list[Proposal]:
        """Let the model write `count` proposals after one prompt."""
        question = Question(operation, history, self._budget)
        prompt = prompts.render(question, self._subject, self.options.template_directory)
        schema = reply_schema.schema(question, narrow=True)
        ids, limit = self._encode(prompt).to(self._model.device), _reply_limit(self._tokenizer, schema)
        read = self._read(ids[:, :-1])
        at_once = self._at_once(read, (ids.shape[1] + limit) / (ids.shape[1] - 1))
        proposals: list[Proposal] = []
        while (missing := count - len(proposals)) > 0:
            batch = min(missing, at_once)
            written = self._write(ids, copy.deepcopy(read), limit, schema, batch, int(rng.integers(2**31)))
            tokens = ids.shape[1] // count + written.shape[1]  # the prompt is read once for all
            texts = self._tokenizer.batch_decode(written, skip_special_tokens=True)
            proposals += [reply_schema.proposal(question, prompt, text, tokens) for text in texts]
        return proposals

    def tell(self, scored: Sequence[Scored]) -> None:
        """Ignore the scores: the history in the prompt holds them."""

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        self._model.get_decoder()(ids, cache=cache, use_cache=True)
        return cache

    def _at_once(self, read: DynamicCache, growth: float) -> int:
        """Return how many caches, each at the end `growth` times as large as `read`, fit into `CACHE_MEMORY`."""
        layers: Any = read.layers
        size = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        return max(1, int(CACHE_MEMORY * weights / (size * growth)))

    @torch.inference_mode()
    def _write(
        self, ids: Tensor, cache: DynamicCache, limit: int, schema: dict[str, Any], count: int, seed: int
    ) -> Tensor:
        """Write `count` replies, `[count, ≤ limit]`; `cache` holds the prompt without its last token."""
        cache.batch_repeat_interleave(count)
        repeated = ids.repeat(count, 1)
        with fork_rng(self._model.device), attending_by_group(self._model):
            torch.manual_seed(seed)
            out = self._model.generate(  # type: ignore[operator]
                repeated,
                attention_mask=torch.ones_like(repeated),
                cache=cache,
                do_sample=True,
                temperature=self.options.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=limit,
                pad_token_id=self._tokenizer.eos_token_id,
                eos_token_id=self._tokenizer.eos_token_id,
                logits_processor=LogitsProcessorList([_SchemaMask(self._grammar_tokens, schema, count)]),
            )
        return out[:, ids.shape[1] :]

    def _encode(self, prompt: str) -> Tensor:
        if self._tokenizer.chat_template:
            return torch.tensor([prompt_ids(self._tokenizer, [{"role": "user", "content": prompt}])])
        return self._tokenizer(prompt, return_tensors="pt")["input_ids"]


def _reply_limit(tokenizer: PreTrainedTokenizerBase, schema: dict[str, Any]) -> int:
    """Return the token limit of a reply: twice the tokens of the longest reply under the schema, plus 16."""
    longest = json.dumps(reply_schema.example(schema), separators=(",", ":"))
    return 16 + 2 * len(tokenizer(longest, add_special_tokens=False)["input_ids"])


class _SchemaMask(LogitsProcessor):
    """Sets the logits of all tokens that would break the schema to minus infinity, for every row of a batch."""

    def __init__(self, tokens: llguidance.LLTokenizer, schema: dict[str, Any], count: int) -> None:
        grammar = llguidance.JsonCompiler(separators=(",", ":"), whitespace_flexible=False).compile(json.dumps(schema))
        self._matchers = [llguidance.LLMatcher(tokens, grammar) for _ in range(count)]
        self._end = tokens.eos_token
        self._started = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._started:
            for matcher, token in zip(self._matchers, input_ids[:, -1].tolist(), strict=True):
                if not matcher.is_stopped():
                    matcher.consume_token(token)
        self._started = True
        allowed = torch.tensor(np.stack([self._allowed(m, scores.shape[1]) for m in self._matchers]))
        return scores.masked_fill(~allowed.to(scores.device), -torch.inf)

    def _allowed(self, matcher: llguidance.LLMatcher, vocabulary: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        if matcher.is_stopped():  # the reply is complete; other rows may still go on
            return np.arange(vocabulary) == self._end
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        return np.unpackbits(bits, bitorder="little")[:vocabulary].astype(bool)
