"""What identifies a run: whatever decides its course, each thing alone; a run directory is of one identity."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields, replace

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner
from selfpruner_hub.errors import RunMismatchError, UserError
from selfpruner_hub.models.weights import weights_hash
from selfpruner_hub.search.llm import prompts
from selfpruner_hub.search.llm.reply_schema import PARENTS
from selfpruner_hub.settings import CHOICES, PruneSettings

WINDOW = 32
SMALL = {"window": WINDOW, "calibration_tokens": 2 * WINDOW, "fitness_tokens": WINDOW, "fisher_tokens": WINDOW}
TEXT = "".join(chr(ord("a") + i % 23) for i in range(3 * WINDOW))
"""Exactly what these settings read: two windows of calibration, then one of the search."""


class _ReachedError(Exception):
    """The main path came as far as its journal."""


@pytest.fixture
def identity(monkeypatch):
    """Start a run, and give what its journal is told of it; nothing is pruned."""

    def journal(_directory, settings):
        raise _ReachedError(json.dumps(settings, sort_keys=True))

    monkeypatch.setattr("selfpruner_hub.pruner.Journal", journal)

    def identity(model=None, name="tests/llama", beta=0.3, data=TEXT, **arguments):
        pruner = AutoPruner(model or tiny_model("llama"), tiny_tokenizer(), name)
        settings = {"proposer": "evolution", "progress": False, **SMALL, **arguments}
        with pytest.raises(_ReachedError) as caught:
            pruner.prune(beta, data=[data], **settings)
        return str(caught.value)

    return identity


def other_values(name, value):
    """Values of a setting that may stand in the place of its own."""
    if name in CHOICES:
        words = CHOICES[name]
        return [words[:1], words[1:2]] if isinstance(value, tuple) else [word for word in words if word != value]
    if isinstance(value, bool):
        return [not value]
    if name == "multiple_of":
        return [2]  # 1 is what 0 chooses for so small a model
    if isinstance(value, (int, float)):
        return [type(value)(each) for each in (value + 1, value / 2, value + 0.1) if type(value)(each) != value]
    return [(1.0,)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("name", [f.name for f in fields(PruneSettings) if f.name != "templates"])
def test_every_setting_alone(name, identity):
    before = getattr(replace(PruneSettings(), **SMALL), name)
    refused = []
    for value in other_values(name, before):
        try:
            assert identity(**{name: value}) != identity()
            return
        except UserError as error:
            refused.append(str(error))
    pytest.fail(f"no other value of {name} was taken: {refused}")


def test_the_same_run_is_the_same(identity):
    assert identity() == identity()


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.4}, {"seed": 1}, {"proposer": "random"}, {"name": "tests/other"}, {"preset": "paper"}],
    ids=lambda changes: next(iter(changes)),
)
def test_every_argument_alone(changes, identity):
    assert identity(**changes) != identity()


def test_the_seed_where_it_draws_the_same_text(identity):
    """One window for each text, of a text that has two: the search is another all the same."""
    texts = {"data": TEXT[: 2 * WINDOW], "calibration_tokens": WINDOW, "fitness_tokens": WINDOW}
    one, two = (json.loads(identity(seed=seed, **texts)) for seed in (0, 1))
    assert one["data"] == two["data"]
    assert one != two


@pytest.mark.parametrize("place", [5, len(TEXT) - 5], ids=["calibration", "fitness"])
def test_either_text_alone(place, identity):
    assert identity(data=f"{TEXT[:place]}Z{TEXT[place + 1 :]}") != identity()


def test_other_weights_of_the_same_shape(identity):
    assert identity(tiny_model("llama", seed=1)) != identity(tiny_model("llama"))


def test_the_same_weights_in_another_dtype(identity):
    rounded = [tiny_model("llama").bfloat16() for _ in range(2)]
    rounded[1].float()
    assert weights_hash(rounded[0]) == weights_hash(rounded[1])
    assert identity(rounded[0]) != identity(rounded[1])


def test_the_same_weights_with_other_heads(identity):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model, other = tiny_model("llama"), tiny_model("llama", **heads)
    assert weights_hash(model) == weights_hash(other)
    assert identity(model) != identity(other)


def test_the_text_of_every_prompt_and_not_its_place(identity, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for operation in PARENTS:
            (tmp_path / folder / f"{operation}.txt").write_text(prompts.template(operation))
    assert identity(templates=str(tmp_path / "one")) == identity(templates=str(tmp_path / "two")) == identity()
    for operation in PARENTS:
        changed = shutil.copytree(tmp_path / "one", tmp_path / operation)
        (changed / f"{operation}.txt").write_text("Another prompt.")
        assert identity(templates=str(changed)) != identity()


@pytest.mark.parametrize("name", [name for name, _ in tiny_model("llama").named_parameters()])
def test_the_hash_is_of_every_parameter(name):
    model = tiny_model("llama")
    before = weights_hash(model)
    with torch.no_grad():
        model.get_parameter(name).add_(1)
    assert weights_hash(model) != before


def test_a_run_directory_is_of_one_identity(tmp_path):
    """With the journal itself: to go on with other weights would mix two searches."""

    def prune(seed):
        AutoPruner(tiny_model("llama", seed), tiny_tokenizer(), "tests/llama").prune(
            0.3, data="self", proposer="evolution", window=WINDOW, calibration_tokens=512, fitness_tokens=128,
            evaluations=0, run_dir=tmp_path, progress=False,
        )  # fmt: skip

    prune(seed=0)
    prune(seed=0)
    with pytest.raises(RunMismatchError, match="weights"):
        prune(seed=1)
