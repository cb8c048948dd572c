"""A pruned model with its record: saving, loading, export and publishing."""

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
from selfpruner_hub.search.journal import JOURNAL_FILE
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Record, read_record
from selfpruner_hub.storage.staging import save_directory


class PrunedModel:
    """A pruned model with its tokenizer, record and journal.

    Args:
        model: Pruned transformers model.
        tokenizer: Tokenizer of the model, or None.
        report: Record, the content of `selfpruner.json`.
        journal: Text of `search.jsonl`.
        checkpoints: Checkpoints of the run that made the model; they are deleted when the model is saved or published.
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
        """Write weights, configuration, tokenizer, model code, record, journal and card, completely or not at all.

        Args:
            directory: Directory of the files, created if missing; files of the same names are replaced.
            max_shard_size: Maximum size of a file of weights, in bytes or as in `"1GB"`; one such file is in memory at
                a time.

        Raises:
            OutputError: The directory cannot be written.
        """
        self._write(Path(directory), max_shard_size)
        self._checkpoints.clear()

    def _write(self, directory: Path, max_shard_size: int | str = "1GB") -> None:
        with save_directory(directory) as staging:
            self.model.config._name_or_path = self.report.base_model
            self.model.save_pretrained(staging, max_shard_size=max_shard_size)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
            (staging / MODEL_RECORD_FILE).write_text(self.report.to_json(), encoding="utf-8")
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
        space: bool = False,
        exports: Sequence[str] = (),
        token: str | None = None,
    ) -> Published:
        """Save into a temporary directory, and publish it by `hub.publish.publish`.

        Args:
            repo_id: Hub repository, `name` or `namespace/name`; created if missing.
            private: Visibility of a new repository; None uses the account's default.
            revision: Branch; created if missing. None is the main branch.
            create_pr: Whether to open a pull request instead of a commit.
            space: Whether to publish the demo Space `REPO_ID-demo` as well.
            exports: Formats to publish beside the weights, such as `("onnx", "gguf")`.
            token: Hub token; None uses the stored one, or HF_TOKEN.

        Returns:
            Addresses of the model and the Space, and whether a commit was made.

        Raises:
            UserError: The Hub refuses.
            HubError: The Hub is unreachable, or fails.
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
        """Write the model in another format, and compare the export with this model.

        Args:
            to: Format: `"onnx"`, `"tensorrt"`, `"openvino"`, `"gguf"` or `"padded"`.
            output: Directory of the export; files of the same names are replaced.
            tolerance: Largest allowed difference of a logit from PyTorch's in float32; None uses the format's default.
            **options: Options of the format, such as `dtype`.

        Returns:
            `output`.

        Raises:
            UserError: The format, an option or the output is wrong, or a library is missing.
            ExportError: The export differs from this model, and is deleted.
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
        journal = directory / JOURNAL_FILE
        return cls(model, tokenizer, report, journal.read_text(encoding="utf-8") if journal.is_file() else "")


def _export(directory: Path, formats: Sequence[str]) -> None:
    """Export a saved model, each format into a folder of its name."""
    from exporters.export import export  # it imports this package

    for name in dict.fromkeys(formats):
        export(directory, name, directory / name)
