"""The model card: every number in it is one of the record's, and none is left out or made up."""

import re
from collections import Counter
from dataclasses import replace

import pytest
import yaml

from selfpruner_hub.cards import render_card
from selfpruner_hub.records import Metric, Record

RECORD = Record(
    base_model="example/parent",
    beta=0.31,
    achieved_beta=0.3098,
    rates=(0.123, 0.456, 0.35),
    widths={"intermediate_size": [421, 261, 312], "num_key_value_heads": [14, 13, 12]},
    parameters={"dense": 1234567, "pruned": 876543},
    method={"importance": "wanda-sp", "repair": True, "fitness": "kl"},
    seed=77,
    proposer={"name": "evolution", "evaluations": 48.25, "best_from": "seed:ramp", "tokens": 9876},
    data={"calibration": {"name": "first.txt", "tokens": 5120}, "fitness": {"name": "second.txt", "tokens": 2560}},
    versions={"torch": "8.13.0", "transformers": "9.24.0"},
    metrics={
        "perplexity": Metric(23.4567, 19.8765, "held-out.txt, 44 windows"),
        "search_fitness": Metric(0.0639, None, "kl on 2560 tokens"),
    },
)
BARE = replace(RECORD, metrics={})
OWN_NUMBERS = (
    *("31", "31.0"),  # achieved, in the title and the first line
    *("1,234,567", "876,543"),
    *("1", "12.3", "14", "421", "2", "45.6", "13", "261", "3", "35.0", "12", "312"),
    *("0.31", "0.3098", "48.25", "9876", "77", "5120", "2560", "8.13.0", "9.24.0"),
)
FIGURES = ("19.8765", "23.4567", "0.0639", "44", "2560")


def parts(card):
    """The YAML front matter, and the text of the card up to the citation."""
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body.split("## Citation")[0]


def numbers(card):
    return Counter(re.findall(r"\d(?:[\d.,]*\d)?", parts(card)[1]))


@pytest.mark.parametrize(("record", "expected"), [(RECORD, OWN_NUMBERS + FIGURES), (BARE, OWN_NUMBERS)])
def test_the_numbers_are_exactly_those_of_the_record(record, expected):
    assert numbers(render_card(record)) == Counter(expected)


def test_no_figure_is_invented():
    body = parts(render_card(BARE))[1]
    table = re.search(r"\| \| dense parent \|.*?\n(?=\n)", body, re.DOTALL)[0]
    assert table.splitlines()[2:] == ["| parameters | 1,234,567 | 876,543 |"]


def test_figures_stand_beside_those_of_the_dense_parent_with_their_protocol():
    card = render_card(RECORD)
    assert "| perplexity | 19.8765 | 23.4567 |" in card
    assert "| search_fitness | – | 0.0639 |" in card
    assert "**perplexity**: held-out.txt, 44 windows." in card


def test_the_front_matter_has_the_tags_and_the_parent():
    front, body = parts(render_card(RECORD))
    assert front == {
        "base_model": "example/parent",
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruned", "structured-pruning", "selfpruner"],
    }
    assert "[example/parent](https://huggingface.co/example/parent)" in body


@pytest.mark.parametrize("path", ["parent", "/home/someone/models/parent", "../models/parent"])
def test_no_path_of_the_host_is_published(path):
    card = render_card(replace(RECORD, base_model=path))
    front, body = parts(card)
    assert not {"base_model", "base_model_relation"} & set(front)
    assert "# parent, pruned by 31 %" in body
    assert "someone" not in card
    assert "models/" not in card
    assert "huggingface.co" not in card


@pytest.mark.parametrize(("repair", "said"), [(True, "repair on"), (False, "repair off")])
def test_settings_are_told(repair, said):
    card = render_card(replace(RECORD, method={**RECORD.method, "repair": repair}))
    assert said in card
    assert "Importance `wanda-sp`" in card


def test_the_code_loads_the_repository():
    assert parts(render_card(RECORD, "me/small"))[1].count('from_pretrained("me/small"') == 2
