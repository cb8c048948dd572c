"""`selfpruner.json`: what is written is read back, and what is not such a record is refused."""

import json
from dataclasses import fields, replace

import pytest

from selfpruner_hub.errors import SavedModelError
from selfpruner_hub.plans.plan import Plan
from selfpruner_hub.storage.model_record import MODEL_RECORD_FILE, Metric, Record, read_record

RECORD = Record(
    base_model="example/parent",
    beta=0.3,
    achieved_beta=0.2998,
    rates=(0.25, 0.35),
    widths={"intermediate_size": [40, 30], "num_key_value_heads": [4, 3]},
    parameters={"dense": 1000, "pruned": 800},
    method={
        "fitness": "kl",
        "importance": "taylor",
        "repair": "full",
        "seeds": ["uniform"],
        "schedule": {"evaluations": 0},
    },
    seed=0,
    proposer={"name": "evolution", "evaluations": 4, "best_from": "seed:uniform", "tokens": 0},
    data={name: {"name": "a.txt", "tokens": 640} for name in ("calibration", "fitness")},
    versions={"torch": "2.13"},
    metrics={
        "perplexity": Metric(12.5, 10.25, "a.txt, 4 windows"),
        "search_fitness": Metric(0.1, None, "kl, β = 0.3"),
    },
)
KEYS = [f.name for f in fields(Record)]


def changed(**values):
    return json.dumps({**json.loads(RECORD.to_json()), **values})


def read(text):
    return Record.from_json(text, "some/selfpruner.json")


def assert_refused(text, said=""):
    with pytest.raises(SavedModelError, match=said) as caught:
        read(text)
    assert "some/selfpruner.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_round_trip():
    assert read(RECORD.to_json()) == RECORD


def test_the_schema_version_stands_first():
    assert list(json.loads(RECORD.to_json())) == ["schema_version", *KEYS[:-1]]


def test_the_plan_is_that_of_the_widths():
    assert RECORD.plan == Plan.of([40, 30], [4, 3])


def test_no_number_that_json_lacks_is_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(RECORD, beta=float("nan")).to_json()


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_version_is_refused(version):
    assert_refused(changed(schema_version=version), f"schema version {version!r}; this version reads 1")


def test_an_unknown_key_is_refused():
    assert_refused(changed(surprise=1), "unknown or missing keys: surprise")


@pytest.mark.parametrize("key", ["base_revision", "weights"])
def test_a_key_that_earlier_versions_did_not_write(key):
    values = json.loads(RECORD.to_json())
    del values[key]
    assert read(json.dumps(values)) == RECORD


@pytest.mark.parametrize("key", sorted({*KEYS} - {"base_revision", "weights"}))
def test_a_missing_key_is_refused(key):
    values = json.loads(RECORD.to_json())
    del values[key]
    assert_refused(json.dumps(values), "schema version None" if key == "schema_version" else f"keys: {key}")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", RECORD.to_json()[:-20], "\x00" * 50])
def test_damaged_json_is_refused(text):
    assert_refused(text, "damaged")


@pytest.mark.parametrize(
    "values",
    [
        {"rates": [0.3]},
        {"rates": [0.3, -1]},
        {"beta": 1e308},
        {"achieved_beta": -0.1},
        {"parameters": {"dense": 100, "pruned": -1}},
        {"rates": [0.3, 0.3, 0.3]},
        {"rates": [0.3, float("nan")]},
        {"rates": ["0.3", "0.3"]},
        {"rates": 0.3},
        {"widths": {"intermediate_size": [40, 30]}},
        {"widths": {"intermediate_size": [40, 30], "num_key_value_heads": [4]}},
        {"metrics": {"perplexity": {"value": 1.0}}},
        {"metrics": {"perplexity": {"value": 1.0, "dense": None, "protocol": "", "more": 1}}},
        {"metrics": [1]},
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused(values):
    assert_refused(changed(**values), "damaged")


def test_read_record(tmp_path):
    (tmp_path / MODEL_RECORD_FILE).write_text(RECORD.to_json(), encoding="utf-8")
    assert read_record(tmp_path) == RECORD


def test_a_directory_without_a_record(tmp_path):
    with pytest.raises(SavedModelError, match="not a model that selfpruner saved") as caught:
        read_record(tmp_path)
    assert "selfpruner prune" in caught.value.hint


def test_a_record_that_is_not_text(tmp_path):
    (tmp_path / MODEL_RECORD_FILE).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SavedModelError, match="damaged"):
        read_record(tmp_path)
