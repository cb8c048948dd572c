"""The model card: every number in it is one of the record's, and none is left out or made up."""

import re
from collections import Counter
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from support.hub_server import check_yaml

from selfpruner_hub.hub.card import OLDEST_TRANSFORMERS, render_card, save_metrics
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.provenance import changed_in_place, trained
from selfpruner_hub.search.llm.endpoint_proposer import BEHIND
from selfpruner_hub.storage.model_record import ALREADY_READ, Metric, Record, read_record

MADE = Path(__file__).parents[2] / "model_cards"
RECORD = Record(
    base_model="example/parent",
    beta=0.31,
    achieved_beta=0.3098,
    rates=(0.123, 0.456, 0.35),
    widths={"intermediate_size": [421, 261, 312], "num_key_value_heads": [14, 13, 12]},
    parameters={"dense": 1234567, "pruned": 876543},
    method={"importance": "wanda-sp", "repair": "full", "fitness": "kl", "schedule": {"evaluations": 48}},
    seed=77,
    proposer={
        "name": "evolution",
        "evaluations": 48.25,
        "best_from": "seed:ramp",
        "tokens": 9876,
        "gains": {"search_text": [0.0711, 0.0639], "unseen_text": [0.0822, 0.0733]},
    },
    data={"calibration": {"name": "first.txt", "tokens": 5120}, "fitness": {"name": "second.txt", "tokens": 2560}},
    versions={"torch": "8.13.0", "transformers": "9.24.0"},
    metrics={
        "perplexity": Metric(23.4567, 19.8765, "held-out.txt, 44 windows"),
        "search_fitness": Metric(0.0639, None, "kl on 2560 tokens"),
    },
)
PICTURES = ("plots/rates.png", "plots/search.png")
BARE = replace(RECORD, metrics={})
OWN_NUMBERS = (
    *("31", "31.0"),  # achieved, in the title and the first line
    "5.24",  # the oldest transformers
    *("20", "0", "20", "0"),  # the code: how many tokens to write, and the first of the batch
    *("1,234,567", "876,543"),
    *("1", "12.3", "14", "421", "2", "45.6", "13", "261", "3", "35.0", "12", "312"),
    *("0.0711", "0.0639", "0.0822", "0.0733", "10.1", "10.8"),  # the gains of the search, and in percent
    *("0.31", "0.3098", "48.25", "9876", "77", "5120", "2560", "8.13.0", "9.24.0"),
)
FIGURES = ("19.8765", "23.4567", "0.0639", "44", "2560")
SPEED = Metric(12.5, 20.125, "6 runs", unit="ms", machine="a CPU", date="2026-11-05")


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
    tables = re.findall(r"\| \| dense parent \|.*?\n(?=\n)", body, re.DOTALL)
    assert [table.splitlines()[2:] for table in tables] == [["| parameters | 1,234,567 | 876,543 |"]]
    assert "Its quality was not measured." in body
    assert "Its speed was not measured." in body
    assert "plots/" not in body


def test_figures_stand_beside_those_of_the_dense_parent_with_their_protocol():
    card = render_card(RECORD)
    assert "| perplexity | 19.8765 | 23.4567 |" in card
    assert "* **perplexity**: held-out.txt, 44 windows." in card
    assert "| search_fitness |" not in card  # no figure of quality
    assert "* search_fitness: 0.0639 (kl on 2560 tokens)." in card


def test_what_is_left_of_chat_stands_first():
    chat = {
        "agreement (conversations)": Metric(0.8125, 0.9875, "16 conversations", dataset="conversations"),
        "plain questions answered": Metric(0.61, 0.84, "200 questions", dataset="plain questions"),
        "plain questions kept": Metric(0.714, None, "168 questions", dataset="plain questions"),
    }
    for given, said in (
        (chat, "Of the plain questions that its parent answers, it answers 71 %."),
        ({"plain questions answered": chat["plain questions answered"]}, "It answers 61 % of the plain questions."),
    ):
        card = render_card(replace(RECORD, metrics={**RECORD.metrics, **given, "prefill": SPEED}), chat=True)
        body = parts(card)[1]
        headings = ["## Chat", said, "| plain questions answered | 0.84 | 0.61 |", "## Quality", "| perplexity |"]
        places = [body.index(text) for text in [*headings, "## Speed", "## How to load it", "search_fitness"]]
        assert places == sorted(places)
        assert check_yaml(card) == []
    types = [result.metric_type for result in ModelCard(render_card(replace(RECORD, metrics=chat))).data.eval_results]
    assert types == ["agreement", "plain_questions_answered", "plain_questions_kept"]


def test_a_chat_model_whose_answers_were_not_measured_says_so():
    assert "What is left of its answers was not measured." in render_card(RECORD, chat=True)
    assert "## Chat" not in render_card(RECORD)


def test_the_code_of_a_chat_model_uses_its_template():
    base, chat = (render_card(RECORD, exports=["onnx", "gguf"], chat=chat) for chat in (False, True))
    assert (base.count("apply_chat_template("), base.count("handle_chat_completions(")) == (0, 0)
    assert (chat.count("apply_chat_template("), chat.count("handle_chat_completions(")) == (3, 1)
    for card in (base, chat):
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == 4
        for block in blocks:
            compile(block, "card", "exec")
            assert block == block.strip() + "\n"


def test_the_gain_of_the_search_is_told_with_the_texts_that_it_was_measured_on():
    gains = {"search_text": [0.0711, 0.0639], "unseen_text": [0.0822, 0.0733]}
    record = Record.from_json(replace(RECORD, proposer={**RECORD.proposer, "gains": gains}).to_json(), "record")
    told = " ".join(render_card(record).split())
    assert (
        "kl went from 0.0711 to 0.0639 on the text that the search selected on, and from 0.0822 to 0.0733 on "
        "text that neither calibration, nor repairs, nor search have seen."
    ) in told


def test_a_gain_that_was_not_measured_is_not_told():
    for gains in ({}, {"search_text": [0.0711, 0.0639]}):  # without a search
        assert "went from" not in render_card(replace(RECORD, proposer={**RECORD.proposer, "gains": gains}))
    older = {key: value for key, value in RECORD.proposer.items() if key != "gains"}
    assert "went from" not in render_card(replace(RECORD, proposer=older))


def test_speed_stands_apart_with_its_machine_and_date():
    body = parts(render_card(replace(RECORD, metrics={**RECORD.metrics, "prefill": SPEED})))[1]
    quality, speed = body.split("## Speed")
    assert "prefill" not in quality
    assert "| prefill | 20.125 ms | 12.5 ms |" in speed
    assert "* **prefill**: 6 runs; machine: a CPU; measured on 2026-11-05." in speed


def test_the_model_index_holds_what_was_measured_on_a_known_text():
    measured = replace(RECORD.metrics["perplexity"], dataset="Salesforce/wikitext")
    task = Metric(0.5, 0.75, "lm-evaluation-harness", dataset="ARC (easy)")
    metrics = {**RECORD.metrics, "perplexity": measured, "acc_norm, arc_easy": task, "prefill": SPEED}
    card = ModelCard(render_card(replace(RECORD, metrics=metrics)))
    assert card.data.model_name == "parent, pruned by 31 %"
    assert [(r.metric_type, r.metric_value, r.dataset_type, r.dataset_name) for r in card.data.eval_results] == [
        ("perplexity", 23.4567, "Salesforce/wikitext", "Salesforce/wikitext"),
        ("acc_norm", 0.5, "ARC-easy-", "ARC (easy)"),
    ]
    assert check_yaml(str(card)) == []


@pytest.mark.parametrize(
    ("licence", "front", "said"),
    [
        ({}, {}, "look it up"),
        ({"license": "mit"}, {"license": "mit"}, "That of the parent: mit."),
        (
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/l"},
            {"license": "other", "license_name": "mine", "license_link": "https://example.org/l"},
            "That of the parent: [mine](https://example.org/l).",
        ),
    ],
)
def test_the_licence_is_that_of_the_parent(licence, front, said):
    card = render_card(replace(RECORD, licence=licence))
    found, body = parts(card)
    assert {key: value for key, value in found.items() if key.startswith("license")} == front
    assert said in body
    assert check_yaml(card) == []


def test_pictures_and_exports_are_told_of_only_where_they_are():
    bare, full = render_card(RECORD), render_card(RECORD, pictures=PICTURES, exports=["onnx", "gguf"])
    for said in ("plots/rates.png", "plots/search.png", "OnnxCausalLM", "llama.cpp", "- onnx", "- gguf"):
        assert said in full
        assert said not in bare


def test_the_address_of_a_server_is_not_published():
    card = render_card(replace(RECORD, proposer={**RECORD.proposer, "name": f"qwen{BEHIND}"}))
    assert "proposals by `qwen` behind an OpenAI-compatible endpoint" in card
    assert "10.0.0.7" not in card


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
    assert check_yaml(card) == []


@pytest.mark.parametrize(("repair", "said"), [("full", "repair full"), ("none", "repair none")])
def test_settings_are_told(repair, said):
    card = render_card(replace(RECORD, method={**RECORD.method, "repair": repair}))
    assert said in card
    assert "Importance `wanda-sp`" in card


def test_the_code_loads_the_repository():
    assert parts(render_card(RECORD, "me/small"))[1].count('from_pretrained("me/small"') == 3
    assert parts(render_card(RECORD, "me/small", "b"))[1].count('from_pretrained("me/small", revision="b"') == 3


@pytest.mark.parametrize("name", sorted(path.parent.name for path in MADE.glob("*/selfpruner.json")))
def test_cards_of_models_that_we_made_are_those_of_their_records(name):
    directory = MADE / name
    pictures = [path.relative_to(directory).as_posix() for path in directory.glob("plots/*.png")]
    card = render_card(read_record(directory), f"me/{name}", pictures=pictures, chat="instruct" in name)
    assert (directory / "README.md").read_text(encoding="utf-8") == card
    assert len(pictures) == 3


@pytest.mark.parametrize(
    ("search_text", "unseen_text", "says"),
    [
        ([0.08, 0.06], [0.09, 0.0855], "The search gained 25.0 % on its own text, and 5.0 % on unseen text."),
        ([0.08, 0.06], [0.09, 0.091], "25.0 % on its own text, and nothing on unseen text: the gain does not hold."),
        ([0.08, 0.08], [0.09, 0.09], "The search found nothing better than its best seed plan."),
    ],
)
def test_it_says_what_the_search_found(search_text, unseen_text, says):
    gains = {"search_text": search_text, "unseen_text": unseen_text}
    assert says in render_card(replace(RECORD, proposer={**RECORD.proposer, "gains": gains}))


def test_the_oldest_transformers_is_that_of_the_package():
    (needed,) = [each for each in requires("selfpruner-hub") if re.match(r"transformers[^\w-]", each)]
    assert f">={OLDEST_TRANSFORMERS}" in needed
    assert f"with transformers {OLDEST_TRANSFORMERS} or later" in render_card(RECORD)


def test_a_figure_on_a_text_that_made_the_model_says_so(saved_model):
    record = read_record(saved_model)
    name = record.data["calibration"]["name"]
    figures = {key: Metric(20.5, None, "4 windows", dataset=data) for key, data in (("a", name), ("b", "other.txt"))}
    saved = save_metrics(saved_model, figures)
    assert ALREADY_READ in saved.metrics["a"].protocol
    assert saved.metrics["b"] == figures["b"]
    mixed = replace(record, data={"calibration": {"name": "chat and own.txt"}})
    assert ALREADY_READ in mixed.marked({"c": replace(figures["b"], dataset="own.txt")})["c"].protocol
    assert (saved_model / "README.md").read_text().count(ALREADY_READ) == 1


def test_texts_of_an_earlier_training_are_not_forgotten(saved_model):
    record, model = read_record(saved_model), load_model(str(saved_model))[0]
    recovered = replace(trained(record, model, "distilled"), recovery={"texts": [{"name": "own.txt"}]})
    again = trained(recovered, model, "LoRA on my-data")
    assert again.method["training"] == "distilled, then LoRA on my-data"
    assert again.recovery is None  # its figures are of other weights
    figure = {"a": Metric(20.5, None, "4 windows", dataset="own.txt")}
    assert ALREADY_READ not in record.marked(figure)["a"].protocol
    assert ALREADY_READ in again.marked(figure)["a"].protocol
    assert ALREADY_READ in changed_in_place(again).marked(figure)["a"].protocol
    assert Record.from_json(again.to_json(), "a record") == again
