"""Which proposer a word stands for, and what is said where none does."""

from types import SimpleNamespace

import pytest
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

from selfpruner_hub.errors import ModelError, UserError
from selfpruner_hub.models.architectures import shape_of
from selfpruner_hub.plans.budget import ParameterBudget
from selfpruner_hub.search.choose_proposer import choose_proposer
from selfpruner_hub.search.llm.endpoint import EndpointProposer
from selfpruner_hub.search.llm.local_model import ModelProposer
from selfpruner_hub.search.proposers import EvolutionProposer, RandomProposer
from selfpruner_hub.search.slopes import SlopesProposer
from selfpruner_hub.settings import resolve


@pytest.fixture(scope="module")
def choose():
    model = tiny_model("llama")
    budget = ParameterBudget(shape_of(model.config), 0.3)

    def choose(proposer, tokenizer=None, evaluations=8, endpoint_model=None):
        method = resolve("default", evaluations=evaluations)
        return choose_proposer(proposer, endpoint_model, budget, method, "tests/llama", (model, tokenizer))

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


def test_what_has_the_protocol_stays(choose):
    mine = RandomProposer(ParameterBudget(shape_of(tiny_model("llama").config), 0.3))
    assert choose(mine) is mine


@pytest.mark.parametrize("missing", ["name", "ask", "tell"])
def test_an_object_without_the_protocol_is_refused(choose, missing):
    mine = SimpleNamespace(**{name: name for name in ("name", "ask", "tell") if name != missing})
    with pytest.raises(UserError, match=f"The proposer is a SimpleNamespace without '{missing}'"):
        choose(mine)


def test_without_evaluations_nothing_is_loaded(choose, tmp_path):
    assert type(choose(str(tmp_path / "none"), evaluations=0)) is EvolutionProposer


def test_without_a_tokenizer(choose):
    with pytest.raises(UserError, match="proposer='self' needs the model's tokenizer, and there is none"):
        choose("self")


def test_unknown(choose):
    with pytest.raises(UserError, match=r"Unknown proposer 'oracle'\..*Choose self, evolution"):
        choose("oracle")


def test_missing_directory(choose, tmp_path):
    with pytest.raises(ModelError):
        choose(str(tmp_path / "none"))
