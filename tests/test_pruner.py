"""What `AutoPruner` decides itself: which text goes into calibration and fitness."""

import math
import shutil

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from support.chat import chat_tokenizer
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from selfpruner_hub import AutoPruner
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.generated_text import continuations
from selfpruner_hub.errors import DataError, ModelError, RunMismatchError, UnsupportedArchitectureError, UserError
from selfpruner_hub.provenance import describe
from selfpruner_hub.search.proposers import RandomProposer
from selfpruner_hub.settings import SEARCH

WINDOW, CALIBRATION, FITNESS = 32, 20, 8


@pytest.fixture
def article(tmp_path):
    """A text of capital As alone, which a random model does not write."""
    path = tmp_path / "article.txt"
    path.write_text("A" * WINDOW * (CALIBRATION + FITNESS))
    return str(path)


@pytest.fixture
def texts(monkeypatch):
    """Prune, and give the record and the windows that were calibrated and scored on."""
    found = []

    def spy(pruned, request, *results):
        found[:] = request.texts[:2]
        return describe(pruned, request, *results)

    monkeypatch.setattr("selfpruner_hub.pruner.describe", spy)

    def prune(data, **settings):
        made = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
            0.3, data=data, proposer="evolution", window=WINDOW, calibration_tokens=WINDOW * CALIBRATION,
            fitness_tokens=WINDOW * FITNESS, evaluations=0, progress=False, **settings,
        )  # fmt: skip
        return made.report, [text.windows for text in found]

    return prune


def of_article(windows):
    return [bool((window == ord("A")).all()) for window in windows]


@pytest.mark.parametrize(("share", "own"), [(0, (0, 0)), (0.25, (5, 2)), (1, (20, 8))])
def test_a_share_of_both_texts_is_the_models_own(share, own, article, texts):
    parts = {article: 1 - share, "self": share}
    data = "+".join(source for source, part in parts.items() if part)
    shares = tuple(part for part in parts.values() if part)
    record, found = texts(data, shares=shares)
    assert [len(windows) for windows in found] == [CALIBRATION, FITNESS]
    assert tuple(of_article(windows).count(False) for windows in found) == own
    names = [name for name, part in (("article.txt", 1 - share), ("self", share)) if part]
    assert record.data["calibration"]["name"] == " and ".join(names)
    assert record.method["shares"] == list(shares)


def test_the_first_windows_are_of_both(article, texts):
    _, (calibration, _) = texts(f"{article}+self")
    assert set(of_article(calibration[: CALIBRATION // 2])) == {True, False}


def test_no_window_that_the_model_wrote_is_in_both_texts(article, texts):
    _, found = texts(f"{article}+self")
    own = [{tuple(row) for row in windows.tolist() if set(row) != {ord("A")}} for windows in found]
    assert not own[0] & own[1]


def test_a_model_alone_needs_no_share(texts):
    record, (first, _) = texts("self")
    _, (again, _) = texts("self", shares=(0.25,))
    assert torch.equal(first, again)
    assert record.data["calibration"]["name"] == "self"


def test_a_text_too_short_is_too_short_with_a_share_too(tmp_path, texts):
    (tmp_path / "short.txt").write_text("A" * WINDOW * 5)
    with pytest.raises(DataError, match="are needed"):
        texts(f"{tmp_path / 'short.txt'}+self", shares=(0.75, 0.25))


@pytest.mark.parametrize(
    ("tokenizer", "preset", "sources"),
    [
        (chat_tokenizer, "default", ["chat", "wikitext2"]),
        (tiny_tokenizer, "default", ["wikitext2"]),
        (chat_tokenizer, "paper", ["wikitext2"]),
        (tiny_tokenizer, "paper", ["wikitext2"]),
    ],
)
def test_the_default_text(tokenizer, preset, sources, monkeypatch):
    asked = []

    def load(source, _tokenizer, *, tokens, window, **_):
        asked.append(source)
        return Corpus.of(source, torch.arange(tokens).view(-1, window) % 100 + 3)

    monkeypatch.setattr("selfpruner_hub.calibration.texts.load_corpus", load)
    made = AutoPruner(tiny_model("llama"), tokenizer(), "tests/llama").prune(
        0.3, preset=preset, proposer="evolution", window=WINDOW, calibration_tokens=WINDOW * 4,
        fitness_tokens=WINDOW * 2, evaluations=0, progress=False,
    )  # fmt: skip
    assert asked == sources
    assert made.report.data["calibration"]["name"] == " and ".join(sources)


@pytest.mark.parametrize(
    ("settings", "length"),
    [({}, 0), ({"evaluations": 1}, 1), ({"proposer": "random"}, SEARCH), ({"proposer": "random", "evaluations": 0}, 0)],
)
def test_the_default_searches_where_someone_asks(monkeypatch, capsys, settings, length):
    """Elsewhere the best seed is taken, and a line says so."""
    asked = []
    monkeypatch.setattr(
        "selfpruner_hub.pruner.choose_proposer",
        lambda _name, _model, _options, budget, searches, *_: asked.append(searches) or RandomProposer(budget),
    )
    few = {"window": WINDOW, "calibration_tokens": WINDOW * 4, "fitness_tokens": WINDOW * 2, "repair": "output"}
    made = AutoPruner(tiny_model("llama"), None, "tests/llama").prune(0.5, data="self", **few, **settings)
    assert made.report.method["schedule"]["evaluations"] == length
    assert asked == [length > 0]
    assert ("no search" in capsys.readouterr().err) == (not settings)


def changed(**attributes):
    """A tiny model whose configuration was changed after it was built."""
    model = tiny_model("llama", num_hidden_layers=2)
    for name, value in attributes.items():
        setattr(model.config, name, value)
    return model


def mixed():
    model = changed().to(torch.bfloat16)
    model.lm_head.float()
    return model


def flexible():
    model = changed()
    model.set_attn_implementation("flex_attention")
    return model


def adapted():
    model = changed()
    return inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)


def undecided():
    model = changed()
    model.generation_config.temperature = 0.5
    return model


@torch.inference_mode()
def inferred():
    return changed()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: "some/model", "A transformers model is needed; got str."),
        (tiny_tokenizer, "A transformers model is needed; got"),
        (lambda: torch.compile(changed(), backend="eager"), "The model is compiled."),
        (lambda: changed(num_hidden_layers=3), "The model has 2 layers, and its configuration says 3."),
        (mixed, "The model has weights in bfloat16 and float32; pruning needs one dtype."),
        (flexible, "flex_attention has no backward pass on a CPU"),
        (inferred, "The model was made in torch.inference_mode()"),
        (undecided, "The generation settings of the model cannot be saved: `temperature`"),
        (adapted, "The model has adapters. Merge them into its weights first"),
    ],
    ids=["name", "tokenizer", "compiled", "layers", "dtypes", "flex", "inference", "generation", "adapters"],
)
def test_what_cannot_be_pruned_says_so_before_any_work(model, said):
    with pytest.raises(UserError) as caught:
        AutoPruner(model(), tiny_tokenizer(), "tests/llama")
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_model_is_no_name():
    with pytest.raises(UserError, match="takes the name of a model; got LlamaForCausalLM"):
        AutoPruner.from_pretrained(changed())


def test_a_tokenizer_is_no_name():
    with pytest.raises(UserError, match="The tokenizer is a name, 'tests/llama'"):
        AutoPruner(tiny_model("llama"), "tests/llama", "tests/llama")


def test_tokens_beyond_the_embeddings_are_refused_before_any_pass(article):
    model = tiny_model("llama", num_hidden_layers=2, vocab_size=60)
    model.register_forward_pre_hook(lambda *_: pytest.fail("a pass began"))
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("a pass began"))
    pruner, few = AutoPruner(model, tiny_tokenizer(), "tests/llama"), {"window": WINDOW, "calibration_tokens": WINDOW}
    with pytest.raises(ModelError, match="The text has token 65, and the model has embeddings of tokens 0 to 59 alone"):
        pruner.prune(0.3, data=article, fitness_tokens=WINDOW, progress=False, **few)
    with pytest.raises(ModelError, match="The text has token 60, and"):
        continuations(model, [[5, 60], [7]], 2)


def test_tuples_for_outputs_change_nothing():
    settings = {"data": "self", "preset": "draft", "window": WINDOW, "progress": False}
    few = {"calibration_tokens": WINDOW * CALIBRATION, "fitness_tokens": WINDOW * FITNESS}
    tuples, named = changed(return_dict=False), changed()
    made = [AutoPruner(model, None, "tests/llama").prune(0.3, **settings, **few) for model in (tuples, named)]
    assert all(map(torch.equal, made[0].model.parameters(), made[1].model.parameters()))
    assert tuples.config.return_dict is False


class KilledError(Exception):
    """The process is killed."""


@pytest.fixture
def prune_chat(tmp_path):
    """Prune a tiny chat model on its own conversations and text in one run directory; tells what was done."""

    def prune(end_at=None, **settings):
        told = []

        def tell(what, done, *_):
            told.append(what)
            if what == end_at and done:
                raise KilledError

        pruner = AutoPruner(tiny_model("llama"), chat_tokenizer(), "tests/llama")
        try:
            made = pruner.prune(
                0.3, data="chat+self", proposer="evolution", window=WINDOW, calibration_tokens=512,
                fitness_tokens=128, evaluations=4, run_dir=tmp_path / "run", progress=tell, **settings,
            )  # fmt: skip
        except KilledError:
            made = None
        return made, set(told)

    return prune


def test_a_chat_model_is_pruned_on_what_it_writes_and_a_run_goes_on(prune_chat, tmp_path):
    ended, told = prune_chat("repairing")
    assert ended is None
    assert {"writing questions", "writing answers", "sampling text"} <= told
    made, told = prune_chat()
    assert not {"writing questions", "writing answers", "sampling text"} & told
    assert made.report.data["calibration"]["name"] == made.report.data["fitness"]["name"] == "chat and self"
    shutil.rmtree(tmp_path / "run")
    undisturbed, told = prune_chat()
    assert "writing answers" in told
    assert made.report.data == undisturbed.report.data
    assert made.plan == undisturbed.plan
    for a, b in zip(made.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    made.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "run" / "stages").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == chat_tokenizer().chat_template


def test_another_share_is_another_search(prune_chat):
    prune_chat()
    with pytest.raises(RunMismatchError):
        prune_chat(shares=(3, 1))


def test_the_default_dtype_of_the_process_changes_nothing():
    """Whoever loads a bfloat16 model in another thread sets it for this one too."""
    found = []
    for default in (torch.float32, torch.bfloat16):
        model = tiny_model("llama").bfloat16()
        torch.set_default_dtype(default)
        try:
            pruned = AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(
                0.3, data="self", proposer="evolution", window=WINDOW, calibration_tokens=WINDOW * CALIBRATION,
                fitness_tokens=WINDOW * FITNESS, evaluations=4, progress=False,
            )  # fmt: skip
        finally:
            torch.set_default_dtype(torch.float32)
        found.append((pruned.report.widths, pruned.model.state_dict()))
    (widths, weights), (same, again) = found
    assert widths == same
    assert all(torch.equal(value, again[name]) for name, value in weights.items())


@pytest.mark.parametrize(("asked", "multiple"), [({}, 8), ({"multiple_of": 1}, 1), ({"multiple_of": 16}, 16)])
def test_widths_are_multiples_that_hardware_likes_unless_another_is_asked_for(asked, multiple):
    model = tiny_model("llama", intermediate_size=384, num_hidden_layers=2)
    made = AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(
        0.3, data="self", window=WINDOW, calibration_tokens=WINDOW * CALIBRATION, fitness_tokens=WINDOW * FITNESS,
        repair="none", progress=False, **asked,
    )  # fmt: skip
    assert made.report.method["multiple_of"] == multiple
    assert math.gcd(384, *(w.intermediate_size for w in made.plan.layers)) % multiple == 0


def test_the_name_of_the_present_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(save_tiny("llama", tmp_path / "mine"))
    assert AutoPruner.from_pretrained(".", device="cpu").name == "mine"


def test_a_model_that_is_assigned_is_checked_as_the_first_is():
    pruner = AutoPruner(tiny_model("llama"), None, "tests/llama")
    with pytest.raises(UnsupportedArchitectureError):
        pruner.model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    pruner.revision = 40 * "a"
    pruner.model = tiny_model("llama", num_hidden_layers=2)
    assert pruner.shape.num_layers == 2
    assert pruner.revision == ""  # that of the other model
