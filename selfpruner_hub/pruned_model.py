"""A pruned model and what is known of it: saved, loaded again."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selfpruner_hub.calibration.chat_template import has_chat_template
from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.hub.card import render_card
from selfpruner_hub.hub.publish import Published, check_request, publish
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.models.loading import load_model, resolve_directory
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.search.journal import FILE_NAME as JOURNAL_NAME
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.model_record import FILE_NAME, Record, read_record
from selfpruner_hub.storage.staging import save_directory


class PrunedModel:
    """A pruned model with everything that is known of it.

    Args:
        model: The pruned transformers model.
        tokenizer: Its tokenizer, or None.
        report: The record that `selfpruner.json` holds.
        journal: The lines of `search.jsonl`.
        checkpoints: Of the run that made it; they end where the model is saved or published.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        report: Record,
        journal: str = "",
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.report = report
        self._journal = journal
        self._checkpoints = checkpoints or Checkpoints()

    @property
    def plan(self) -> Plan:
        """The widths that every layer keeps."""
        return self.report.plan

    def save_pretrained(self, directory: str | Path, *, max_shard_size: int | str = "1GB") -> None:
        """Write weights, configuration, model code, record, journal and card; all of it or nothing.

        Args:
            directory: Created where it does not exist; files of the same names are replaced.
            max_shard_size: Of a file of weights, as in transformers; one such file is in memory at a time.

        Raises:
            OutputError: It cannot be written.
        """
        self._write(Path(directory), max_shard_size)
        self._checkpoints.clear()

    def _write(self, directory: Path, max_shard_size: int | str = "1GB") -> None:
        with save_directory(directory) as staging:
            self.model.config._name_or_path = self.report.base_model
            self.model.save_pretrained(staging, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
            (staging / FILE_NAME).write_text(self.report.to_json(), encoding="utf-8")
            (staging / JOURNAL_NAME).write_text(self._journal, encoding="utf-8")
            card = render_card(self.report, chat=has_chat_template(self.tokenizer))
            (staging / "README.md").write_text(card, encoding="utf-8")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        space: bool = False,
        exports: Sequence[str] = (),
        token: str | None = None,
    ) -> Published:
        """Save into a temporary directory and publish that; `hub.publish.publish` has the arguments.

        Args:
            repo_id: `name`, or `namespace/name`; created where it does not exist.
            private: Visibility of a new repository; None takes the account's default.
            revision: Branch; created where it does not exist.
            create_pr: Open a pull request instead.
            space: Publish the demo Space `REPO_ID-demo` as well.
            exports: Formats to publish beside the weights, such as `("onnx", "gguf")`.
            token: Of the Hub; None takes the stored one, or HF_TOKEN.

        Returns:
            Where it is now.

        Raises:
            UserError: The Hub refuses.
            HubError: The Hub is out of reach, or fails.
        """
        check_request(space=space, create_pr=create_pr, exports=exports)
        with tempfile.TemporaryDirectory() as temporary:
            self._write(directory := Path(temporary) / "model")
            _export(directory, exports)
            published = publish(
                directory,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                space=space,
                token=token,
            )
        self._checkpoints.clear()
        return published

    def export(self, to: str, output: str | Path, *, tolerance: float | None = None, **options: Any) -> Path:
        """Write the model in another format, and compare that with this model.

        Args:
            to: `"onnx"`, `"tensorrt"`, `"openvino"`, `"gguf"` or `"padded"`.
            output: The directory of the export; files of the same names are replaced.
            tolerance: Largest distance of a logit from PyTorch's float32; None takes the format's own.
            **options: Of the format, such as `dtype`.

        Returns:
            `output`.

        Raises:
            UserError: The format, an option or the output is wrong, or a library is missing.
            ExportError: The export differs from this model; nothing is left of it.
        """
        from exporters.export import export_model  # it imports this package

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
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> PrunedModel:
        """Load a pruned model.

        Args:
            name: A directory that `save_pretrained` wrote, or a Hub repository.
            **kwargs: Keywords of transformers' `from_pretrained`.

        Returns:
            The model with its tokenizer, record and journal.

        Raises:
            SavedModelError: It is not a pruned model, or it is damaged.
            ModelError: It is missing, gated or out of reach.
        """
        directory = resolve_directory(str(name), **kwargs)
        report = read_record(directory)
        model, tokenizer = load_model(str(directory), **kwargs)
        if shape_of(model.config).dense != report.plan:
            raise SavedModelError(f"{str(name)!r} is damaged: {FILE_NAME} and config.json disagree on the widths.")
        journal = directory / JOURNAL_NAME
        return cls(model, tokenizer, report, journal.read_text(encoding="utf-8") if journal.is_file() else "")


def _export(directory: Path, formats: Sequence[str]) -> None:
    """Export a model that was just saved, each format into a folder of its name."""
    from exporters.export import export  # it imports this package

    for name in dict.fromkeys(formats):
        export(directory, name, directory / name)
