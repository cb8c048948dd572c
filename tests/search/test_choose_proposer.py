"""Which proposer a word stands for, and what is said where none does."""

from types import SimpleNamespace

import pytest
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

from selfpruner_hub.errors import ModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.search.choose_proposer import choose_proposer
from selfpruner_hub.search.llm.endpoint_proposer import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer
from selfpruner_hub.search.slopes import SlopesProposer
from selfpruner_hub.settings import EndpointOptions, LanguageModelOptions


@pytest.fixture(scope="module")
def choose():
    model = tiny_model("llama")
    budget = Budget(shape_of(model.config), 0.3)

    def choose(proposer, tokenizer=None, searches=True, endpoint_model=None, options=None):
        return choose_proposer(proposer, endpoint_model, options, budget, searches, "tests/llama", (model, tokenizer))

    return choose


@pytest.mark.parametrize(
    ("word", "kind", "name"),
    [
        ("self", ModelProposer, "self"),
        (None, ModelProposer, "self"),
        ("evolution", EvolutionProposer, "evolution"),
        ("slopes", SlopesProposer, "slopes"),
        ("random", RandomProposer, "random"),
    ],
)
def test_words(choose, word, kind, name):
    found = choose(word, tiny_tokenizer())
    assert type(found) is kind
    assert found.name == name


def test_directory(choose, tmp_path):
    other = save_tiny("qwen2", tmp_path / "other")
    found = choose(str(other))
    assert type(found) is ModelProposer
    assert found.name == "other"  # no path of this machine in a journal


def test_endpoint(choose):
    assert type(choose("http://127.0.0.1:9/v1", endpoint_model="some")) is EndpointProposer


@pytest.mark.parametrize(
    ("proposer", "options", "expected"),
    [
        ("self", {"temperature": 0.5}, LanguageModelOptions(temperature=0.5)),
        (None, {"templates": "here"}, LanguageModelOptions(templates="here")),
        ("http://127.0.0.1:9/v1", {"temperature": 2, "token_limit": 5}, EndpointOptions(2, token_limit=5)),
        ("http://127.0.0.1:9/v1", None, EndpointOptions()),
    ],
    ids=str,
)
def test_options_reach_the_language_model(choose, proposer, options, expected):
    assert choose(proposer, tiny_tokenizer(), endpoint_model="some", options=options).options == expected


@pytest.mark.parametrize(
    ("proposer", "options", "said"),
    [
        ("self", {"request_limit": 5}, "Unknown proposer option request_limit.*Known: temperature, templates"),
        ("http://127.0.0.1:9/v1", {"limit": 5}, "Unknown proposer option limit.*request_limit, token_limit"),
        ("http://127.0.0.1:9/v1", {"request_limit": -1}, "request_limit must be a whole number from 0 to"),
        ("self", {"temperature": 0}, "temperature must be a number from 0.001 to 100; got 0"),
        ("self", {"temperature": "hot"}, "temperature must be a number from 0.001 to 100; got 'hot'"),
        ("self", 5, "proposer_options must be a mapping"),
        ("evolution", {"temperature": 1.0}, "this proposer is none"),
        (object(), {"temperature": 1.0}, "this proposer is none"),
    ],
    ids=["local limit", "unknown", "negative", "zero", "word", "number", "evolution", "object"],
)
def test_options_that_are_refused(choose, proposer, options, said):
    with pytest.raises(UserError, match=said):
        choose(proposer, tiny_tokenizer(), endpoint_model="some", options=options)


def test_what_has_the_protocol_stays(choose):
    mine = RandomProposer(None)
    assert choose(mine) is mine


@pytest.mark.parametrize(
    ("mine", "missing"),
    [(object(), "name"), (5, "name"), (SimpleNamespace(name="mine"), "ask")],
    ids=["object", "number", "nameless"],
)
def test_what_does_not_have_it_is_refused(mine, missing, choose):
    with pytest.raises(UserError, match=rf"of type {type(mine).__name__}, has no {missing}\."):
        choose(mine)


def test_without_a_search_nothing_is_loaded(choose, tmp_path):
    assert type(choose(str(tmp_path / "none"), searches=False)) is EvolutionProposer


def test_without_a_tokenizer(choose):
    with pytest.raises(UserError, match="proposer='self' needs the model's tokenizer, and there is none"):
        choose("self")


def test_unknown(choose):
    with pytest.raises(UserError, match=r"Unknown proposer 'oracle'\..*Choose self, evolution"):
        choose("oracle")


def test_missing_directory(choose, tmp_path):
    with pytest.raises(ModelError):
        choose(str(tmp_path / "none"))
