"""What identifies a run: whatever decides its course, each thing alone; a run directory is of one identity."""

from __future__ import annotations

import json
import operator
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from support.chat import TEMPLATES, assistant, chat_tokenizer, user
from support.mixtures import tiny_mixture
from support.tiny import tiny_model, tiny_pruned, tiny_tokenizer

from selfpruner_hub import AutoPruner, PrunedModel
from selfpruner_hub.cli import main
from selfpruner_hub.errors import RunMismatchError, UserError
from selfpruner_hub.models.loading import load_config, load_model
from selfpruner_hub.models.weights import configuration_hash, identity_of, saved_weights, weights_hash
from selfpruner_hub.provenance import check_parent
from selfpruner_hub.search.llm import prompts
from selfpruner_hub.search.llm.reply_schema import PARENTS
from selfpruner_hub.settings import CHOICES, PruneSettings, SearchSchedule
from selfpruner_hub.storage.offload import DiskStore

WINDOW = 32
SMALL = {"window": WINDOW, "calibration_tokens": 2 * WINDOW, "fitness_tokens": WINDOW, "fisher_tokens": WINDOW}
TEXT = "".join(chr(ord("a") + i % 23) for i in range(3 * WINDOW))
"""Exactly what these settings read: two windows of calibration, then one of the search."""


class _ReachedError(Exception):
    """The main path came as far as its journal."""


@pytest.fixture
def told(monkeypatch):
    """Start a run of a pruner, and give what its journal is told of it; nothing is pruned."""

    def journal(_directory, settings, _versions):
        raise _ReachedError(json.dumps(settings, sort_keys=True))

    monkeypatch.setattr("selfpruner_hub.pruner.Journal", journal)

    def told(pruner, data, beta=0.3, **arguments):
        settings = {"proposer": "evolution", "progress": False, **SMALL, **arguments}
        with pytest.raises(_ReachedError) as caught:
            pruner.prune(beta, data=data, **settings)
        return str(caught.value)

    return told


@pytest.fixture
def identity(told):
    """The same of a new pruner."""

    def identity(model=None, name="tests/llama", beta=0.3, data=TEXT, **arguments):
        return told(AutoPruner(model or tiny_model("llama"), tiny_tokenizer(), name), [data], beta, **arguments)

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


@pytest.mark.parametrize(
    "name",
    [
        *(f.name for f in fields(PruneSettings) if f.name != "schedule"),
        *(f"schedule.{f.name}" for f in fields(SearchSchedule) if f.name != "evaluations"),
        "evaluations",
    ],
)
def test_every_setting_alone(name, identity):
    settings = replace(PruneSettings(), **SMALL)
    before = 10 if name == "evaluations" else operator.attrgetter(name)(settings)
    others = {"evaluations": 0} if name == "uniform" else {}  # it leaves nothing to search
    if name == "fewest_experts":
        others = {"model": tiny_mixture("qwen3_moe"), "beta": 0.3}
    refused = []
    for value in other_values(name, before):
        owner, _, last = name.rpartition(".")
        try:
            changed = {owner: {last: value}} if owner else {name: value}
            assert identity(**others, **changed) != identity(**others)
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
    assert identity_of(rounded[0])["weights"] == identity_of(rounded[1])["weights"]
    assert identity(rounded[0]) != identity(rounded[1])


def test_the_same_weights_with_other_heads(identity):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model, other = tiny_model("llama"), tiny_model("llama", **heads)
    assert identity_of(model)["weights"] == identity_of(other)["weights"]
    assert identity(model) != identity(other)


def test_the_text_of_every_prompt_and_not_its_place(identity, tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for operation in PARENTS:
            (tmp_path / folder / f"{operation}.txt").write_text(prompts.template(operation))

    def of(folder=None):
        return identity(proposer="self", proposer_options={"templates": str(folder)} if folder else None)

    assert of(tmp_path / "one") == of(tmp_path / "two") == of()
    for operation in PARENTS:
        changed = shutil.copytree(tmp_path / "one", tmp_path / operation)
        (changed / f"{operation}.txt").write_text("Another prompt.")
        assert of(changed) != of()


@pytest.mark.parametrize(
    ("options", "changes"), [({"temperature": 0.5}, True), ({"token_limit": 9}, True), ({"token_price": 9}, False)]
)
def test_options_that_change_the_replies(options, changes, identity):
    endpoint = {"proposer": "http://127.0.0.1:9/v1", "proposer_model": "m"}
    assert (identity(**endpoint, proposer_options=options) != identity(**endpoint)) == changes


@pytest.mark.parametrize("name", [name for name, _ in tiny_model("llama").named_parameters()])
def test_the_hash_is_of_every_parameter(name):
    model = tiny_model("llama")
    before = identity_of(model)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1].add_(1)
    after = identity_of(model)
    assert {key for key in before if before[key] != after[key]} == {"weights"}


LARGE = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
"""32 times as many values as are sampled."""


@pytest.mark.parametrize(
    ("rows", "columns"),
    [((7, 300), (9, 9)), ((slice(None), slice(None)), (slice(1, 32), slice(33, 64)))],
    ids=["a value of two rows", "columns between those of every 32nd value"],
)
def test_the_hash_is_of_places_too(rows, columns):
    """Values that change places leave the sum of all as it is."""
    changed = LARGE.clone()
    changed[rows[0], columns[0]], changed[rows[1], columns[1]] = (
        LARGE[rows[1], columns[1]],
        LARGE[rows[0], columns[0]],
    )
    assert weights_hash([("a", changed)]) != weights_hash([("a", LARGE)])


def test_the_hash_is_of_every_value_and_not_of_their_order_in_memory():
    assert weights_hash([("a", LARGE)]) == weights_hash([("a", LARGE.t().contiguous().t())])
    changed = LARGE.clone()
    changed[123, 45] += 1e-6
    assert weights_hash([("a", changed)]) != weights_hash([("a", LARGE)])


@pytest.mark.parametrize("name", ["llama-mha-tied", "gemma3", "starcoder2"])
def test_a_model_is_the_same_wherever_it_is(name, tmp_path):
    for made in (tiny_model(name), tiny_pruned(name)):
        known = identity_of(made)
        made.save_pretrained(tmp_path)
        assert identity_of(load_model(str(tmp_path), device="cpu")[0]) == known
        assert weights_hash(saved_weights([tmp_path / "model.safetensors"])) == known["weights"]
        assert configuration_hash(load_config(str(tmp_path))) == known["configuration"]
    streamed = load_model(str(tmp_path), device="cpu", store=DiskStore(tmp_path / "weights"))[0]
    assert identity_of(streamed) == known


def test_names_versions_and_attention_are_not_of_the_model():
    model, other = tiny_model("llama"), tiny_model("llama")
    other.config._name_or_path, other.config.transformers_version = "elsewhere", "9.0"
    other.set_attn_implementation("eager")
    assert identity_of(model) == identity_of(other)


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, {"rms_norm_eps": 0.3}], ids=str
)
def test_the_same_weights_under_another_configuration(change, identity):
    """As many weights of the same shapes, and another model."""
    assert identity(tiny_model("llama", **change)) != identity()


def test_a_run_directory_is_of_one_identity(tmp_path):
    """With the journal itself: to go on with other weights would mix two searches."""

    def prune(seed, **changes):
        AutoPruner(tiny_model("llama", seed, **changes), tiny_tokenizer(), "tests/llama").prune(
            0.3, data="self", proposer="evolution", window=WINDOW, calibration_tokens=512, fitness_tokens=128,
            evaluations=0, run_dir=tmp_path, progress=False,
        )  # fmt: skip

    prune(seed=0)
    prune(seed=0)
    with pytest.raises(RunMismatchError, match="weights"):
        prune(seed=1)
    with pytest.raises(RunMismatchError, match="configuration"):
        prune(seed=0, rms_norm_eps=0.3)


CHANGES = {
    "file": lambda pruner, data: Path(data).write_text(Path(data).read_text()[::-1]),
    "list": lambda pruner, data: data.reverse(),
    "template": lambda pruner, data: setattr(pruner.tokenizer, "chat_template", TEMPLATES["llama3"]),
    "tokenizer": lambda pruner, data: setattr(pruner, "tokenizer", chat_tokenizer("llama3")),
    "weights": lambda pruner, data: pruner.model.lm_head.weight.data.mul_(-1),
    "end": lambda pruner, data: setattr(pruner.model.generation_config, "eos_token_id", [2, 77]),
    "model": lambda pruner, data: setattr(pruner, "model", tiny_model("llama", seed=1)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_second_run_of_a_pruner_reads_what_is_there_by_then(change, told, tmp_path):
    """Texts of the first are used again only where they would come out the same."""
    talks = [[user(f"What is {i}?"), assistant(f"It is {i * i}.")] for i in range(20)]
    data = {"list": [TEXT, TEXT[::-1]], "file": str(tmp_path / "text.txt")}.get(change, "self")
    if change in ("template", "tokenizer"):
        data = str(tmp_path / "talks.jsonl")
        Path(data).write_text("".join(f"{json.dumps({'messages': talk})}\n" for talk in talks))
    (tmp_path / "text.txt").write_text(TEXT)
    pruner = AutoPruner(tiny_model("llama"), chat_tokenizer(), "tests/llama")
    first = told(pruner, data)
    assert told(pruner, data) == first
    CHANGES[change](pruner, data)
    second = told(pruner, data)
    assert json.loads(second)["data"] != json.loads(first)["data"]
    assert second == told(AutoPruner(pruner.model, pruner.tokenizer, "tests/llama"), data)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"seed": 1}, "weights"),
        ({"rms_norm_eps": 0.3}, "configuration"),
        ({"num_hidden_layers": 3}, "parameters and configuration and weights"),
    ],
    ids=["weights", "configuration", "size"],
)
def test_figures_of_another_parent_are_refused(other, what, saved_model, tmp_path, capsys):
    """They would stand in the record and in the card as those of the parent."""
    dense = {"num_hidden_layers": 2}
    pruned = PrunedModel.from_pretrained(saved_model, device="cpu")
    for parent in (tiny_model("llama", **dense), tiny_model("llama", **dense).bfloat16()):
        check_parent(pruned.report, identity_of(parent), "it")
    model = tiny_model("llama", **dense | other)
    with pytest.raises(UserError, match=f"'dense' is not 'tests/llama', the parent of this model: other {what}"):
        pruned.evaluate(str(tmp_path / "text.txt"), dense=model)
    model.save_pretrained(tmp_path / "other")
    before = (saved_model / "selfpruner.json").read_text()
    words = ["evaluate", str(saved_model), "--against", str(tmp_path / "other"), "--save", "--quiet", "--device", "cpu"]
    assert main(words) == 2
    assert f"other {what}. Give the model that was pruned." in capsys.readouterr().err
    assert (saved_model / "selfpruner.json").read_text() == before
