"""The texts of a run: each source gives its share to calibration and to the text that the search selects on."""

from __future__ import annotations

import logging
from hashlib import sha256
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.calibration.corpus import Corpus, load_corpus, sources_of
from selfpruner_hub.calibration.text_sources import GENERATED
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.weights import weights_hash
from selfpruner_hub.settings import Method
from selfpruner_hub.storage.run import Run

CHAT_DATA, PLAIN_DATA = "chat+wikitext2", "wikitext2"
"""Default text of a model with a chat template, and of one without."""
logger = logging.getLogger(__name__)


class Texts:
    """Reads or writes the texts of runs with one model; what was read is kept, so that the next rate has the same.

    Args:
        model: The dense model, which writes `"self"` and `"chat"`.
        tokenizer: Its tokenizer; None allows `"self"` alone.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._known: dict[tuple[Any, ...], tuple[Any, Corpus]] = {}

    def read(self, data: Any, method: Method, run: Run) -> tuple[Corpus, Corpus]:
        """Give the texts of one run.

        Args:
            data: As for `AutoPruner.prune`; None is the default.
            method: The settings: tokens, window, shares.
            run: Surroundings; its checkpoints keep what the model wrote.

        Returns:
            Disjoint windows for calibration and for the search, those of all sources in one order.

        Raises:
            UserError: The shares do not fit the sources, or a source is unknown, unreadable or too short.
        """
        chats = has_chat_template(self._tokenizer)
        if data is None:
            data = CHAT_DATA if chats else PLAIN_DATA
        elif chats and isinstance(data, str) and set(sources_of(data)) <= {"wikitext2", "c4"}:
            logger.warning(
                "This is a chat model, and %s has no conversations: pruned on it alone it answers next to no plain "
                'question. Leave out data, or use data="chat+%s".',
                data,
                data,
            )
        sources = sources_of(data)
        shares = method.shares or (1.0,) * len(sources)
        if len(shares) != len(sources):
            raise UserError(f"{len(shares)} shares do not fit {len(sources)} sources of text.", "Give one for each.")
        parts = [
            self._parts(source, share / sum(shares), method, run) for source, share in zip(sources, shares, strict=True)
        ]
        calibration, held_out = (Corpus.mixed(same, run.seed) for same in zip(*parts, strict=True))
        return calibration, held_out

    def _parts(self, source: Any, share: float, method: Method, run: Run) -> tuple[Corpus, ...]:
        """What one source gives to both."""
        window = min(method.window, getattr(self._model.config, "max_position_embeddings", method.window))
        tokens = method.calibration_tokens, method.fitness_tokens
        wanted = [max(1, -(-int(share * n) // window)) * window for n in tokens]
        key = (source if isinstance(source, str) else id(source), run.seed, window, *wanted)
        if key not in self._known:
            corpus = self._load(source, key, sum(wanted), window, run)
            self._known[key] = source, corpus  # the source is held, so that no other gets its identity
        corpus = self._known[key][1]
        found = min(1.0, corpus.tokens / sum(wanted))
        return corpus.split(*(int(n * found) for n in wanted), seed=run.seed)

    def _load(self, source: Any, key: tuple[Any, ...], tokens: int, window: int, run: Run) -> Corpus:
        """Read a source, or take what the model wrote before."""
        written = isinstance(source, str) and source in GENERATED
        name = f"text-{sha256(repr((weights_hash(self._model), key)).encode()).hexdigest()[:16]}" if written else ""
        if written and (found := run.checkpoints.load(name)):
            return Corpus.of(source, found["windows"])
        corpus = load_corpus(
            source,
            self._tokenizer,
            tokens=tokens,
            window=window,
            seed=run.seed,
            model=self._model,
            progress=run.progress,
        )
        if written:
            run.checkpoints.save(name, {"windows": corpus.windows})
        return corpus
