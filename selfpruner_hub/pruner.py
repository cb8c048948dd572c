"""The main path: calibrate, rank, search, slice, repair."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub import ranks
from selfpruner_hub.aim import aim_of, completed
from selfpruner_hub.calibration.chat_template import template_date
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.served_model import served_by
from selfpruner_hub.calibration.texts import PLAIN_DATA, Texts
from selfpruner_hub.cut import cut
from selfpruner_hub.errors import ModelError, OutputError, SelfPrunerError, UserError
from selfpruner_hub.hub.parent import commit_of, licence_of
from selfpruner_hub.memory import store_for
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.devices import check_one_device, described, out_of_memory
from selfpruner_hub.models.forward import check_ids
from selfpruner_hub.models.loading import is_repo_id, load_model
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.models.placement import streamed, streams
from selfpruner_hub.models.unsupported import check_generation, refuse_quantized
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.plans.plan import ModelShape
from selfpruner_hub.plans.target import Meter
from selfpruner_hub.progress import Bars, Progress
from selfpruner_hub.provenance import RunRequest, describe, fingerprint, library_versions
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruning.prepare import check_model
from selfpruner_hub.pruning.temperature import match_confidence
from selfpruner_hub.search.choose_proposer import choose_proposer
from selfpruner_hub.search.effort import minutes_left, recoverable, with_effort
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.proposers import Proposer
from selfpruner_hub.settings import check_minutes, check_seed, resolve
from selfpruner_hub.storage.checkpoints import CHECKPOINTS, Checkpoints, Clock
from selfpruner_hub.storage.offload import MEMORY, DiskStore, TensorStore
from selfpruner_hub.storage.run import Run
from selfpruner_hub.storage.run_lock import run_lock
from selfpruner_hub.storage.staging import output_path

logger = logging.getLogger(__name__)
_ON_HOST = "Not all of this fits on %s: statistics, activations and the pruned model rest in the memory of the host."


class AutoPruner:
    """Prunes one dense causal language model.

    Args:
        model: Dense model of a supported architecture.
        tokenizer: Tokenizer of the model; without one, only `data="self"` and proposers that need no tokenizer work.
        name: Name of the model in records and cards: its Hub id, where it has one.
        licence: Licence of the model, as `hub.parent.licence_of` returns it.
        store: Store of statistics, hidden states and the pruned model.

    Raises:
        UserError: The model or the tokenizer is not one, or the model is compiled, or has generation settings that
            cannot be saved.
        ModelError: The model object cannot be pruned as it is (`prepare.check_model`), or is on several devices.
        UnsupportedArchitectureError: The architecture is not supported, or the weights are quantised.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        name: str,
        licence: dict[str, str] | None = None,
        store: TensorStore = MEMORY,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise UserError(
                f"name must be the name of the model in records and cards; got {name!r}.", "Give its Hub id."
            )
        if isinstance(tokenizer, str | Path):
            raise UserError(
                f"The tokenizer is a name, {str(tokenizer)!r}.", "Give AutoTokenizer.from_pretrained of it, or None."
            )
        if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UserError(
                f"The tokenizer must be one of transformers; got {type(tokenizer).__name__}.",
                "Give AutoTokenizer.from_pretrained(NAME), or None.",
            )
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.licence = licence or {}
        self._store = store
        self._corpora: dict[str, tuple[int, Corpus]] = {}

    @property
    def model(self) -> PreTrainedModel:
        """Dense model; another one may be assigned."""
        return self._model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        self.revision = ""
        """Commit of the model on the Hub; empty where it came from elsewhere."""
        check_model(model)
        refuse_quantized(model.config, self.name)
        check_generation(model)
        if not streams(model):
            check_one_device(model)
        self._model = model

    @property
    def shape(self) -> ModelShape:
        """Prunable geometry of the dense model."""
        return shape_of(self.model.config)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str | None = None,
        base_model: str | None = None,
        offload_folder: str | Path | None = None,
        **kwargs: Any,
    ) -> AutoPruner:
        """Load a dense model.

        Args:
            name: Directory or Hub repository of the model.
            device: Device that everything runs on, such as `"cpu"` or `"cuda:1"`; None takes the accelerator where
                there is one.
            base_model: Hub repository that a directory is a copy of: records, cards and Spaces name it as the parent,
                and the licence is read from it where the directory has no card.
            offload_folder: Directory on a disk with space for five times the model: weights, statistics, hidden states
                and the pruned model are in files there (`storage.offload.DiskStore`), and one layer at a time is in
                memory. An accelerator holds embeddings, head and the layer that runs. The files are deleted at the end.
            **kwargs: Keywords of transformers' `from_pretrained`: dtype, revision, token, gguf_file, …; a `device_map`
                must put the whole model on one device.

        Returns:
            A pruner of the model.

        Raises:
            UnsupportedArchitectureError: The architecture is not supported, or the weights are quantised.
            ModelError: The model is missing, gated, unreachable or damaged, does not fit into memory, or is spread over
                several devices.
            UserError: `name` is no name, `base_model` is not the name of a repository, or there is no such device.
        """
        if not isinstance(name, str | Path):
            raise UserError(
                f"from_pretrained takes the name of a model; got {type(name).__name__}.",
                "Give a model itself to AutoPruner(model, tokenizer, name).",
            )
        if base_model is not None and not is_repo_id(base_model):
            raise UserError(f"base_model must name a Hub repository, OWNER/NAME; got {base_model!r}.")
        store = MEMORY if offload_folder is None else DiskStore(output_path(offload_folder))
        model, tokenizer = load_model(name, to_prune=True, store=store, device=device, **kwargs)
        called = base_model or (Path(name).resolve().name if Path(name).exists() else name)
        licence = licence_of(name, **kwargs) or (licence_of(base_model) if base_model else {})
        pruner = cls(model, tokenizer, called, licence, store)
        pruner.revision = commit_of(name, **kwargs) if called == name else ""
        return pruner

    def prune(
        self,
        beta: float | None = None,
        *,
        target: Mapping[str, Any] | None = None,
        runtime: str | Meter | None = None,
        request: tuple[int, int] | None = None,
        preset: str | None = None,
        proposer: str | Proposer | None = None,
        proposer_model: str | None = None,
        proposer_options: Mapping[str, Any] | None = None,
        data: Any = None,
        writer: str | None = None,
        writer_model: str | None = None,
        fitness: str | None = None,
        evaluations: float | None = None,
        minutes: float | None = None,
        recover: float | None = None,
        seed: int = 0,
        run_dir: str | Path | None = None,
        progress: bool | Progress = True,
        **changes: Any,
    ) -> PrunedModel:
        """Find the rates of all layers under the mean rate β or a target, and prune the model by them.

        The dense model must not run elsewhere meanwhile: until the pruned model is cut, its weights are reordered in
        place. The processes of a launcher (`ranks`) call this together, with the same arguments and models.

        Args:
            beta: Mean share of the prunable weights to remove, 0 < β < 1.
            target: Target in place of β, one of `{"speedup": 1.5}`, `{"latency": MILLISECONDS}`, `{"memory": "200MB"}`
                and `{"kv_cache": BYTES_PER_TOKEN}`; below 1, the last two are shares of the dense model's. The costs
                of all widths are measured in the runtime, once for a shape of model on a machine.
            runtime: Runtime of the target: `"torch"` (also None), `"onnx"` or `"gguf"` (llama.cpp), or an object that
                follows the `Meter` protocol; vLLM needs `exporters.benchmark.meter.RuntimeMeter("vllm", python=PATH)`.
            request: Tokens of the prompt, and tokens generated after it, of the request that the target's time is for;
                None takes 128 and 32.
            preset: Name of the preset: `"default"`, `"draft"` for a first look (little text, no second repair),
                `"best"` for nearly twice the text, or `"paper"` for the settings of arXiv 2502.14413. None takes the
                default, or with `minutes` what fits into them.
            proposer: Source of rates: `"self"` (the dense model), `"evolution"`, `"slopes"`, `"random"`, a directory or
                Hub repository of another transformers model, the URL of an OpenAI-compatible endpoint, or an object
                that follows the `Proposer` protocol; one that is given searches. None asks the dense model where
                `evaluations` or the preset ask for a search.
            proposer_model: Name of the model at the endpoint; its key comes from the environment
                (SELFPRUNER_API_KEY).
            proposer_options: Options of a language model that proposes, by name: fields of
                `settings.LanguageModelOptions`, and of `settings.EndpointOptions` for an endpoint.
            data: Text of calibration and search. `"chat"` (conversations that the model writes through its chat
                template), `"self"` (plain text that it writes), `"wikitext2"` or `"c4"` (from the Hub), a path to a
                `.txt` or `.jsonl` (one object per line, with a text under `text` or a conversation under `messages`),
                several of them joined by `+`, or an iterable of texts or conversations, such as a list or a
                `datasets.Dataset`. None: `"chat+wikitext2"` for a model with a chat template, else `"wikitext2"`, as
                for the paper's preset.
            writer: URL of an OpenAI-compatible server of this very model (vLLM, llama.cpp), which writes
                `"chat"` and `"self"` in its place: much faster where layers are streamed. The key is found as for a
                proposer.
            writer_model: Name of the model at that server; None takes the only one there.
            fitness: Score of plans, `"kl"` or `"perplexity"`; None uses the preset's.
            evaluations: Length of the search in full-evaluation equivalents, `schedule.evaluations`; 0 takes the best
                seed plan. None uses the preset's (430 for `"paper"`), else `settings.SEARCH` where a proposer is given,
                else 0. A round that has begun is finished.
            minutes: Minutes of the whole run: the preset (where none is given) is what fits by a rough estimate
                (`search.effort`), and recovery takes the rest. None takes the preset, without recovery.
            recover: Minutes of recovery after the cut (`PrunedModel.recover`); the cut has the rest of `minutes`. 0
                trains nothing, as does a model in files (`offload_folder`).
            seed: Random seed.
            run_dir: Directory of the journal and of the checkpoints of each stage; a run with the same directory
                resumes.
            progress: Whether to show bars on stderr, or a function that is called with (what, done, total).
            **changes: Values of other fields of `settings.PruneSettings`; `schedule` is a `SearchSchedule`, or a
                mapping that changes some fields of the preset's.

        Returns:
            The pruned model with its record; the dense model is unchanged.

        Raises:
            UserError: An argument is wrong, the text too short, `run_dir` belongs to another search or is in use, or
                another thread works on the model.
            EndpointError: The server of `writer` does not answer.
        """
        aim = aim_of(beta, target, runtime, request, self.model, self.tokenizer)
        check_seed(seed)
        check_minutes(minutes, recover)
        recover = recoverable(self.model, minutes, recover)
        resolved = partial(resolve, fitness=fitness, evaluations=evaluations, **changes)
        folder = None if run_dir is None else output_path(run_dir)
        checkpoints = Checkpoints(folder and folder / CHECKPOINTS)
        with contextlib.ExitStack() as stack:
            stack.enter_context(ranks.joined(self.model.device))
            ranks.check_device(self.model.device)
            if ranks.count() > 1 and self.shape.expert_weights:
                raise UserError("A mixture of experts is not divided between processes.", "Start one process.")
            ranks.from_first(lambda: stack.enter_context(run_lock(folder)))
            stack.enter_context(working_on(self.model))
            identity = identity_of(self.model)
            known = checkpoints.of(json.dumps([identity, str(self.model.device), changes], default=str))
            clock = Clock(known.of(json.dumps([identity, changes, beta, target, preset, data, seed], default=str)))
            effort = partial(with_effort, preset, resolved, self.model, known)
            settings, lines = ranks.from_first(
                lambda: effort(proposer_given=proposer is not None, minutes=minutes, recover=recover)
            )
            settings = completed(settings, self.shape)
            shown = ranks.is_first() and progress
            callback = shown if callable(shown) else stack.enter_context(Bars(shown))
            if isinstance(callback, Bars):
                self._say(callback, lines)
            budget = ranks.from_first(lambda: aim.budget(settings, callback))
            searches, pair = settings.schedule.length > 0, (self.model, self.tokenizer)
            proposer = choose_proposer(proposer, proposer_model, proposer_options, budget, searches, self.name, pair)
            store = store_for(self.model, self._store, settings, budget.share)
            if store is not self._store:
                stack.enter_context(streamed(self.model))
                logger.warning(_ON_HOST, self.model.device)
            run = Run(store, checkpoints.timed_by(clock), callback, seed)
            served = served_by(writer, writer_model, self.model, self.tokenizer)
            of_cut = PLAIN_DATA if data is None and preset == "paper" else data
            source = Texts(self.model, self.tokenizer, self._corpora, identity, served)
            texts = ranks.from_first(lambda: source.read(of_cut, settings, run))
            check_ids(self.model, max(int(text.windows.max()) for text in texts if text is not None))
            date = template_date(self.tokenizer)
            asked = budget, settings, seed, proposer, texts
            run_request = RunRequest(self.name, identity, *asked, self.revision, self.licence, date)
            search_id = fingerprint(run_request)
            journal = ranks.from_first(lambda: Journal(folder, search_id, library_versions()))
            journal.path = journal.path if ranks.is_first() else None  # one process writes it
            run = replace(run, checkpoints=run.checkpoints.of(json.dumps(search_id)))
            model, result = cut(self.model, proposer, budget, texts, journal, settings, run)
            scale = match_confidence(self.model, model, texts.search.windows, callback) if settings.confidence else 1.0
            described = describe(model, run_request, result, scale)
            record = ranks.from_first(lambda: aim.measured(described, budget, model, callback))
            left = ranks.from_first(lambda: minutes_left(minutes, recover, clock, run.checkpoints))
        pruned = PrunedModel(model, self.tokenizer, record, journal.text(), run.checkpoints, store)
        if left is None:
            return pruned
        try:
            recover_with = partial(pruned.recover, data=data, writer=writer, writer_model=writer_model, seed=seed)
            return recover_with(self.model, minutes=left, run_dir=folder, progress=progress)
        except (SelfPrunerError, RuntimeError, MemoryError) as error:  # what was pruned is not lost
            failure = error if isinstance(error, SelfPrunerError) else out_of_memory(error)
            of_all = isinstance(error, UserError) and not isinstance(error, (ModelError, OutputError))
            if failure is None or (ranks.count() > 1 and not of_all):  # other processes wait for one that failed alone
                raise
            logger.warning("The model was pruned, and not recovered. %s", failure)
            pruned._checkpoints = Checkpoints()  # those of the run stay when it is saved: the same command resumes
            return pruned

    def _say(self, bars: Bars, lines: Sequence[str]) -> None:
        """Show the model, its device, and the reasons for the length of the run."""
        layers = ", one layer at a time" if streams(self.model) else ""
        for line in (f"{self.name} on {described(self.model)}{layers}", *lines):
            bars.say(line)
