"""`selfpruner.json`: everything that is known of a pruned model, as a versioned record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.plans.plan import Plan, plan_of
from selfpruner_hub.storage.versioned_json import REMEDY, Amount, Count, parse_versioned

RECORD_VERSION = 1
MODEL_RECORD_FILE = "selfpruner.json"
ALREADY_READ = "calibration or search read a text of this name, so this is no figure of unseen text"


@dataclass(frozen=True)
class Metric:
    """A measured figure and how it was measured."""

    value: float
    dense: float | None
    """Value of the dense parent, measured in the same run; None where it has no meaning."""
    protocol: str
    """Data, split, windows, tokens, and threads where they matter: all that is needed to repeat the measurement."""
    unit: str = ""
    """Unit, such as `ms` or `tokens/s`; empty where there is none."""
    dataset: str = ""
    """Data set of the measurement, by its name on the Hub where it has one; empty where there is none, as for
    latency."""
    machine: str = ""
    """Name of the CPU or GPU, where the figure depends on it; else empty."""
    date: str = ""
    """Day of the measurement, as in 2026-11-30; empty where unknown."""


@dataclass(frozen=True)
class Record:
    """Content of `selfpruner.json`; field names are its keys."""

    base_model: str
    beta: float
    """Mean rate that was asked for, in (0, 1); `achieved_beta` where a target was asked for."""
    achieved_beta: float
    """Share of the prunable weights (q, k, v, o, gate, up, down; of a mixture, routed experts and routers) that was
    removed, counted from the widths."""
    rates: tuple[float, ...]
    """Share of the prunable weights removed from each layer."""
    widths: dict[str, list[int]]
    """Widths that are kept: `intermediate_size`, or `num_experts` of a mixture (0 in a layer without routed ones), and
    `num_key_value_heads`, one value per layer."""
    parameters: dict[str, int]
    """Number of parameters of `dense` and `pruned`, counted from the tensors, shared ones once."""
    method: dict[str, Any]
    """Every setting of the method; `target`, where one was asked for: its fields, and what was `predicted` and
    `measured` in its terms; `training`, where the weights were trained after pruning: how, in a line; and `trained_on`,
    names of the texts of recoveries before the last training."""
    seed: int
    proposer: dict[str, Any]
    """The proposer and its search: name, options of a language model, evaluations, origin of the best plan, counts of
    replies, tokens. `gains`: fitness of the best seed plan and of the best plan, on `search_text`, the fitness text,
    and on `unseen_text`, which neither calibration nor repairs have read, and by which no plan is chosen."""
    data: dict[str, dict[str, Any]]
    """Texts of the run, `calibration`, `fitness` and, where the gain was measured on it, `unseen`: name, tokens, window
    and hash of each; and `chat_template`, where it writes the date: the `date` that it was given."""
    versions: dict[str, str]
    parent: dict[str, Any] = field(default_factory=dict)
    """Identity of the dense parent, as `models.weights.identity_of` returns it; empty where unknown."""
    base_revision: str = ""
    """Commit of the dense parent on the Hub; empty where it came from elsewhere."""
    licence: dict[str, str] = field(default_factory=dict)
    """Licence of the parent from its model card: `license`, `license_name`, `license_link`; empty where unknown."""
    recovery: dict[str, Any] | None = None
    """How the model was distilled from its parent after the cut (`recovery.recover`): tokens, minutes, settings, texts,
    divergence on each deciding text before and after, and the curve of the loss; None where it was not."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    weights: str = ""
    """Hash of the saved weights (`models.weights.saved_hash`), by which a later change of the files is noticed; empty
    of a model in memory, and of earlier versions."""
    schema_version: int = RECORD_VERSION

    @property
    def plan(self) -> Plan:
        """The widths that every layer keeps."""
        return plan_of(self.widths)

    @property
    def stock(self) -> bool:
        """Whether the model is of a class of transformers, and needs no remote code."""
        return bool(self.method.get("uniform"))

    @property
    def treatment(self) -> str:
        """Treatment of the remaining weights, as the end of a sentence."""
        training = self.method.get("training")
        return f"and was then trained ({training})" if training else "without retraining"

    @property
    def search_verdict(self) -> str:
        """Gain of the search over its best seed plan, in a sentence; empty if not measured on unseen text."""
        gains = self.proposer.get("gains", {})
        if not {"search_text", "unseen_text"} <= gains.keys():
            return ""
        pairs = (gains["search_text"], gains["unseen_text"])
        gain, unseen = (100 * (1 - after / before) if before else 0.0 for before, after in pairs)
        if gain <= 0:
            return "The search found nothing better than its best seed plan."
        if unseen <= 0:
            return (
                f"The search gained {gain:.1f} % on its own text, and nothing on unseen text: the gain does not hold."
            )
        return f"The search gained {gain:.1f} % on its own text, and {unseen:.1f} % on unseen text."

    def marked(self, metrics: Mapping[str, Metric]) -> dict[str, Metric]:
        """Return figures that say so in their protocol where the model was made with a text of that name."""
        texts = [*self.data.values(), *(self.recovery or {}).get("texts", ())]
        names = [*(text["name"] for text in texts if "name" in text), *self.method.get("trained_on", ())]
        read = {part for name in names for part in (name, *name.split(" and "))}
        return {
            key: replace(metric, protocol=f"{metric.protocol}; {ALREADY_READ}") if metric.dataset in read else metric
            for key, metric in metrics.items()
        }

    def to_json(self) -> str:
        """Serialise, schema version first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str) -> Record:
        """Read strictly: all keys and no others, of a known version.

        Args:
            text: Content of the file.
            source: Name of the file, for error messages.

        Returns:
            The record.

        Raises:
            SavedModelError: The text is not such a record.
        """
        inner: dict[str, Any] = {"method": _Method, "proposer": _Search, "data": _Texts, "parameters": _Counts}
        inner["recovery"] = _Recovery | None
        values = parse_versioned(text, source, RECORD_VERSION, cls, inner, ("base_revision", "weights"))
        try:
            metrics = {name: Metric(**metric) for name, metric in values.pop("metrics").items()}
            record = cls(**{**values, "rates": tuple(values["rates"]), "metrics": metrics})
            if len(record.plan.layers) != len(record.rates) or min(record.parameters.values()) < 1:
                raise ValueError("its rates or its parameters do not match its widths")
            if not all(0 <= rate < 1 for rate in (record.beta, record.achieved_beta, *record.rates)):
                raise ValueError("a rate is not in [0, 1)")
        except (ValueError, TypeError, KeyError) as error:
            raise SavedModelError(f"{source} is damaged: {error}.", REMEDY) from error
        return record


class _Target(TypedDict):
    quantity: str
    value: float
    runtime: str
    predicted: float
    measured: float | None
    why: NotRequired[str]


class _Schedule(TypedDict):
    evaluations: Amount | None


class _Method(TypedDict):
    """Settings that are read from a record."""

    fitness: str
    importance: str
    repair: str
    schedule: _Schedule
    training: NotRequired[str]
    trained_on: NotRequired[list[str]]
    target: NotRequired[_Target]


class _Search(TypedDict):
    """Fields of a proposer and its search that are read from a record."""

    name: str
    evaluations: Amount
    best_from: str
    tokens: Count
    replies: NotRequired[dict[str, Count]]
    gains: NotRequired[dict[str, tuple[float, float]]]


class _Text(TypedDict):
    name: str
    tokens: Count


class _Texts(TypedDict):
    calibration: _Text
    fitness: _Text
    unseen: NotRequired[_Text]


class _TrainingText(TypedDict):
    name: str
    tokens_read: Count


class _Deciding(TypedDict):
    name: str
    tokens: Count
    before: float
    after: float


class _Answers(TypedDict):
    asked: Count
    before: Count
    after: Count


class _Recovery(TypedDict):
    """Fields of a recovery that are read from a record."""

    method: Literal["full", "lora"]
    tokens: Count
    minutes: Amount
    texts: list[_TrainingText]
    deciding: list[_Deciding]
    answers: NotRequired[_Answers | None]
    curve: list[tuple[Count, float]]


class _Counts(TypedDict):
    dense: int
    pruned: int


def read_record(directory: Path) -> Record:
    """Read the record of a saved model.

    Args:
        directory: Directory of `selfpruner.json`.

    Returns:
        The record.

    Raises:
        SavedModelError: The directory holds no pruned model, or its record is damaged.
    """
    path = directory / MODEL_RECORD_FILE
    if not path.is_file():
        raise SavedModelError(
            f"{str(directory)!r} is not a model that selfpruner saved (it has no {MODEL_RECORD_FILE}).",
            "Give a directory written by `selfpruner prune` or `save_pretrained`.",
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SavedModelError(f"{path} cannot be read, or is damaged.", REMEDY) from error
    return Record.from_json(text, str(path))
