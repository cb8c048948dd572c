"""The three disjoint texts of a run: calibration text, fitness text, and a third text that neither of them contains."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.calibration.conversations import end_tokens
from selfpruner_hub.calibration.corpus import Corpus, load_corpus
from selfpruner_hub.calibration.served_model import ServedModel
from selfpruner_hub.calibration.text_sources import GENERATED, HUB_SOURCES, is_file, sources_of, tokenizer_hash
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.settings import PruneSettings
from selfpruner_hub.storage.run import Run

CHAT_DATA, PLAIN_DATA = "chat+wikitext2", "wikitext2"
"""Default text for a model with a chat template, and for one without."""
logger = logging.getLogger(__name__)


class RunTexts(NamedTuple):
    """Texts that share no window; in each, the windows of all sources are shuffled together."""

    calibration: Corpus
    """Calibration text: statistics are measured on it, and both repairs are fitted to it."""
    search: Corpus
    """Fitness text: the search selects plans on it, and the temperature is chosen on it."""
    unseen: Corpus | None
    """Third text, by which no plan is chosen: the gain of the search is measured on it, and the search ends where it
    gains nothing there. None if there is no search, or if the text has only one window for the search."""


class Texts:
    """Reads or generates the texts of runs, and keeps them, so that runs at other β use the same texts.

    Args:
        model: The dense model, which writes `"self"` and `"chat"`.
        tokenizer: Its tokenizer; None allows only `"self"`.
        cache: Texts that were read before, by their identity; they are used again, and new ones are added.
        identity: Identity of the model (`models.weights.identity_of`); None finds it out where a text depends on it.
        served: The model behind a server, to write in place of the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        cache: dict[str, tuple[int, Corpus]] | None = None,
        identity: Mapping[str, Any] | None = None,
        served: ServedModel | None = None,
    ) -> None:
        self._model, self._tokenizer, self._author = model, tokenizer, served or model
        self._cache = {} if cache is None else cache
        self._identity_of_model = identity

    def read(self, data: Any, settings: PruneSettings, run: Run) -> RunTexts:
        """Return the texts of one run.

        Args:
            data: Text argument of `AutoPruner.prune`; None uses the default text.
            settings: Settings: tokens, window, shares.
            run: Run context; its checkpoints keep generated text.

        Returns:
            The texts. The unseen text has as many tokens as the fitness text; if a source is too short for that, at
            least a third of what the calibration leaves.

        Raises:
            UserError: The shares do not match the sources, or a source is unknown, unreadable or too short.
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
        given = settings.shares
        shares = given if isinstance(given, Sequence) else [given if _is_written(each) else 1.0 for each in sources]
        if len(shares) != len(sources):
            raise UserError(f"{len(shares)} shares do not fit {len(sources)} sources of text.", "Give one for each.")
        parts = [
            self._parts(source, share / sum(shares), settings, run)
            for source, share in zip(sources, shares, strict=True)
        ]
        unseen = [part.unseen for part in parts if part.unseen is not None]
        return RunTexts(
            Corpus.mixed([part.calibration for part in parts], run.seed),
            Corpus.mixed([part.search for part in parts], run.seed),
            Corpus.mixed(unseen, run.seed) if unseen else None,
        )

    def _parts(self, source: Any, share: float, settings: PruneSettings, run: Run) -> RunTexts:
        """The windows of one source for each of the three texts."""
        window = min(settings.window, getattr(self._model.config, "max_position_embeddings", settings.window))
        tokens = settings.calibration_tokens, settings.fitness_tokens
        sizes = [max(1, -(-int(share * n) // window)) * window for n in tokens]
        identity = self._identity(source)
        key = json.dumps([identity, run.seed, window, *sizes])
        # Text that is read always includes spare text, so the calibration text is the same with and without a search.
        # Spare text that the model writes would take minutes, so it is generated only for a search.
        spare = sizes[1] if settings.schedule.evaluations or not _is_written(source) else 0
        enough, corpus = self._cache.get(key, (-1, None))
        if corpus is None or enough < spare:
            corpus = self._load(source, key, sum(sizes), spare, window, run)
        elif _is_written(source):  # in another run, and this one may have to resume
            run.checkpoints.save(_checkpoint_of(key, spare), {"windows": corpus.windows})
        if identity is not None:
            self._cache[key] = max(enough, spare), corpus
        part = min(1.0, corpus.tokens / sum(sizes))
        calibration, search = (max(1, int(n * part) // window) for n in sizes)
        unseen = 0
        if settings.schedule.evaluations:
            left = len(corpus.windows) - calibration - search
            taken = max(0, min(search - 1, max(1, (search + left) // 3) - left))  # from the fitness text
            search, unseen = search - taken, left + taken
        parts = corpus.split(*(n * window for n in (calibration, search, unseen) if n > 0), seed=run.seed)
        return RunTexts(parts[0], parts[1], parts[2] if unseen > 0 else None)

    def _load(self, source: Any, key: str, tokens: int, spare: int, window: int, run: Run) -> Corpus:
        """Load a source; generated text comes from the checkpoint if there is one."""
        written = _is_written(source)
        name = _checkpoint_of(key, spare)
        if written and (tensors := run.checkpoints.load(name)):
            return Corpus.of(source, tensors["windows"])
        corpus = load_corpus(
            source,
            self._tokenizer,
            tokens=tokens,
            window=window,
            spare=spare,
            seed=run.seed,
            model=self._author,
            progress=run.progress,
        )
        if written:
            run.checkpoints.save(name, {"windows": corpus.windows})
        return corpus

    def _identity(self, source: Any) -> list[Any] | None:
        """Identity of the text of a source; None for objects, which may change, and are read anew each time."""
        tokens = tokenizer_hash(self._tokenizer)
        if _is_written(source):
            ends = sorted(end_tokens(self._model, self._tokenizer))
            return [source, tokens, ends, self._identity_of_model or identity_of(self._model)]
        if isinstance(source, str) and source in HUB_SOURCES:
            return [source, tokens]
        if is_file(source):
            path = Path(source).resolve()
            stat = path.stat()
            return [str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, tokens]
        return None


def _is_written(source: Any) -> bool:
    """Whether the model generates this source."""
    return isinstance(source, str) and source in GENERATED


def _checkpoint_of(key: str, spare: int) -> str:
    """Name of the checkpoint of a text that a model writes."""
    return f"text-{sha256(f'{key} {spare}'.encode()).hexdigest()[:16]}"
