"""A pruned model with its record: saving, loading, export and publishing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.errors import SavedModelError, UserError
from selfpruner_hub.evaluation.figures import text_figures, window_of
from selfpruner_hub.evaluation.metrics import teach
from selfpruner_hub.hub.card import render_card
from selfpruner_hub.hub.exports import make_exports
from selfpruner_hub.hub.publish import STATIC, Published, check_request, is_aside, publish
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.forward import check_ids
from selfpruner_hub.models.loading import load_model, resolve_directory
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.models.stock_config import save_model
from selfpruner_hub.models.unsupported import check_generation
from selfpruner_hub.models.weights import sampled, saved_hash
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.provenance import changed_in_place
from selfpruner_hub.retraining import Retraining
from selfpruner_hub.search.journal import JOURNAL_FILE
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.layout import GENERATION, MODEL_CODE, TEMPLATES, TOKENIZER, WEIGHTS
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Metric, Record, read_record
from selfpruner_hub.storage.offload import MEMORY, TensorStore
from selfpruner_hub.storage.staging import check_replaceable, output_path, save_directory
from selfpruner_hub.storage.versioned_json import REMEDY

OFFLOADED_SHARD = "1GB"
"""Maximum size of a file of weights, for a model that is larger than memory."""


class PrunedModel(Retraining):
    """A pruned model with its tokenizer, record and journal.

    Args:
        model: Pruned transformers model.
        tokenizer: Tokenizer of the model, or None.
        report: Record, the content of `selfpruner.json`.
        journal: Text of `search.jsonl`.
        checkpoints: Checkpoints of the run that made the model; they are deleted when the model is saved or published.
        store: Store that the weights are in; from files, they are saved in small shards, one in memory at a time.

    Attributes that it does not have itself are those of `model`: `config`, `dtype`, `generation_config`, …
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        report: Record,
        journal: str = "",
        checkpoints: Checkpoints | None = None,
        store: TensorStore = MEMORY,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.report = report
        self._journal = journal
        self._checkpoints = checkpoints or Checkpoints()
        self._store = store
        self._sampled = sampled(model)

    @property
    def plan(self) -> Plan:
        """The widths that every layer keeps."""
        return self.report.plan

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def __getattr__(self, name: str) -> Any:
        """Attribute of the transformers model."""
        if name == "model" or name.startswith("__"):  # while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute where it is read: of the transformers model, unless it belongs to this object."""
        if name in ("model", "tokenizer", "report") or name.startswith("_") or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.model, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; arguments and result are those of the transformers model."""
        return self.model(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate tokens; arguments and result are those of transformers' `generate`."""
        return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    def evaluate(
        self,
        data: str = "wikitext2",
        *,
        window: int | None = None,
        windows: int | None = None,
        dense: PreTrainedModel | None = None,
    ) -> dict[str, Metric]:
        """Measure the perplexity on a text, and the divergence from the dense model; `report` gets the figures too.

        Args:
            data: `"wikitext2"` or `"c4"` (test split), or a path to a `.txt` or `.jsonl` file.
            window: Tokens per window, from 2 to as many as the model was made to read; None takes 2048, or as many as
                that.
            windows: Number of windows, from the start of the text; None takes all, or 256 of c4.
            dense: The dense model, to compare with; None leaves the comparison out.

        Returns:
            Figures by name, each with its protocol, and the dense model's value where it has one.

        Raises:
            DataError: The text is unreadable or too short, or the model has no tokenizer.
            ModelError: The text has tokens that the model has no embedding of.
            UserError: The window is too wide, a perplexity is not finite, `dense` is not the model that was pruned, or
                another thread works on one of the models.
        """
        if dense is not None:
            self._check_dense(dense)
        corpus = consecutive_windows(data, self.tokenizer, window_of(self.model, window), windows)
        check_ids(self.model, int(corpus.windows.max()))
        self._notice_training()
        with working_on(self.model, *([] if dense is None else [dense])):
            teacher = None if dense is None else teach(dense, corpus.windows, counted=corpus.counted)
            metrics = text_figures(self.model, corpus, teacher)
            theirs = {} if dense is None else text_figures(dense, corpus)
        if dense is not None:
            metrics = {k: replace(m, dense=theirs[k].value) if k in theirs else m for k, m in metrics.items()}
        metrics = self.report.marked(metrics)
        self.report = replace(self.report, metrics={**self.report.metrics, **metrics})
        return metrics

    def save_pretrained(
        self,
        directory: str | Path,
        *,
        max_shard_size: int | str | None = None,
        is_main_process: bool = True,
        overwrite: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **publishing: Any,
    ) -> None:
        """Write weights, configuration, tokenizer, model code, record, journal and card, completely or not at all.

        Args:
            directory: Directory of the files, created if missing; files of the same names are replaced, and other files
                of a model (weights, tokenizer, chat templates) are deleted.
            max_shard_size: Maximum size of a file of weights, in bytes or as in `"5GB"`; None is transformers' default,
                or 1 GB for a model that is in files, because one shard is in memory at a time.
            is_main_process: Whether to write anything; a distributed run writes from one process alone.
            overwrite: Whether to replace a model that this package did not write, such as the dense one.
            push_to_hub: Whether to publish what was saved, as `hub.publish.publish` does.
            repo_id: Hub repository for that; None takes the name of the directory.
            **publishing: Other arguments of `hub.publish.publish`: commit_message, private, token, revision, …

        Raises:
            OutputError: The directory cannot be written, or holds another model.
            UserError: There are arguments for publishing and nothing is published, the generation settings contradict
                each other, or the Hub refuses.
            HubError: The Hub is unreachable, or fails.
        """
        used = signature(publish).parameters if push_to_hub else {}
        if unused := [name for name in (*publishing, *(["repo_id"] if repo_id else [])) if name not in used]:
            hint = "Leave it out, or set push_to_hub=True if it is for publishing."
            raise UserError(f"save_pretrained has no use for {unused[0]!r}.", hint)
        if not is_main_process:
            return
        place = output_path(directory)
        check_replaceable(place, MODEL_RECORD_FILE, overwrite)
        self._write(place, max_shard_size)
        if push_to_hub:
            publish(place, repo_id or place.name, **publishing)
        self._checkpoints.clear()

    def _write(self, directory: Path, max_shard_size: int | str | None = None) -> None:
        check_generation(self.model)
        self._notice_training()
        size = max_shard_size or (OFFLOADED_SHARD if self._store.apart else None)
        sharding: Any = {} if size is None else {"max_shard_size": size}
        earlier = (*TOKENIZER, *TEMPLATES, GENERATION) if (directory / "config.json").exists() else ()
        with save_directory(directory, stale=(*WEIGHTS, MODEL_CODE, *earlier)) as staging:
            self.model.config._name_or_path = self.report.base_model
            save_model(self.model, staging, **sharding)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
            record = replace(self.report, weights=saved_hash(staging))
            (staging / MODEL_RECORD_FILE).write_text(record.to_json(), encoding="utf-8")
            (staging / JOURNAL_FILE).write_text(self._journal, encoding="utf-8")
            card = render_card(self.report, chat=has_chat_template(self.tokenizer))
            (staging / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        space: bool | str = False,
        exports: Sequence[str] = (),
        token: str | bool | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        max_shard_size: int | str | None = None,
        **unknown: Any,
    ) -> Published:
        """Save into a temporary directory, and publish it by `hub.publish.publish`.

        Args:
            repo_id: Hub repository, `name` or `namespace/name`; created if missing.
            private: Visibility of a new repository; None uses the account's default.
            revision: Branch; created if missing. None is the main branch.
            create_pr: Whether to open a pull request instead of a commit.
            space: Kind of the Space to publish as well, as for `hub.publish.publish`.
            exports: Formats to publish too, such as `("onnx", "gguf")`; graphs of ONNX go to `REPO_ID-ONNX`.
            token: Hub token; None or True uses the stored one, or HF_TOKEN.
            commit_message: Message of the commit, one line; None writes one.
            commit_description: Text below the message, or None.
            max_shard_size: Maximum size of a file of weights, as for `save_pretrained`.
            **unknown: Arguments of transformers' method that have no use here; they are refused.

        Returns:
            Addresses of the model, its graphs and the Space, and whether a commit to the model was made.

        Raises:
            UserError: An argument has no use here, or the Hub refuses.
            HubError: The Hub is unreachable, or fails.
        """
        for name in unknown:
            raise UserError(f"push_to_hub has no use for {name!r}.", "Leave it out.")
        aside = is_aside(create_pr, revision)
        check_request(space=space, create_pr=aside, private=private, exports=exports)
        with tempfile.TemporaryDirectory() as temporary:
            self._write(directory := Path(temporary) / "model", max_shard_size)
            make_exports(directory, exports, static=space == STATIC)
            published = publish(
                directory,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                space=space,
                token=token,
                commit_message=commit_message,
                commit_description=commit_description,
            )
        self._checkpoints.clear()
        return published

    def export(self, to: str, output: str | Path, *, tolerance: float | None = None, **options: Any) -> Path:
        """Write the model in another format, and compare the export with this model.

        Args:
            to: Format, such as `"onnx"` or `"gguf"`: a key of `storage.layout.EXPORTS`.
            output: Directory of the export; files of the same names are replaced.
            tolerance: Largest allowed difference of a logit from PyTorch's in float32; None uses the format's default.
            **options: Options of the format, such as `dtype`; `overwrite=True` replaces a model that is no export.

        Returns:
            `output`.

        Raises:
            UserError: The format, an option or the output is wrong, or a library is missing.
            ExportError: The export differs from this model, and is deleted.
        """
        from exporters.export import export_model  # it imports this package

        self._notice_training()
        return export_model(
            self.model,
            self.tokenizer,
            to,
            output,
            name=f"{self.report.base_model} at β = {self.report.beta}",
            record=self.report,
            tolerance=tolerance,
            **options,
        )

    @classmethod
    def from_pretrained(cls, name: str | Path, *, device: str | None = None, **kwargs: Any) -> PrunedModel:
        """Load a pruned model.

        Args:
            name: Directory that `save_pretrained` wrote, or a Hub repository.
            device: Device; None takes the accelerator where there is one.
            **kwargs: Keywords of transformers' `from_pretrained`.

        Returns:
            The model with its tokenizer, record and journal.

        Raises:
            SavedModelError: The model is not a pruned model, or is damaged.
            ModelError: The model is missing, gated or unreachable.
        """
        directory = resolve_directory(str(name), **kwargs)
        report = read_record(directory)
        model, tokenizer = load_model(str(directory), device=device, **kwargs)
        if shape_of(model.config).dense != report.plan:
            raise SavedModelError(
                f"{str(name)!r} is damaged: {MODEL_RECORD_FILE} and config.json disagree on the widths."
            )
        if report.weights and report.weights != saved_hash(directory):
            report = changed_in_place(report)
        journal = directory / JOURNAL_FILE
        try:
            text = journal.read_text(encoding="utf-8") if journal.is_file() else ""
        except (OSError, UnicodeDecodeError) as error:
            raise SavedModelError(f"{str(journal)!r} cannot be read, or is damaged.", REMEDY) from error
        return cls(model, tokenizer, replace(report, weights=""), text)
