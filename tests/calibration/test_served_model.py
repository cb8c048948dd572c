"""The dense model behind a server: it writes what the model would, and a server of something else is refused."""

import threading

import pytest
import torch
from support.chat import chat_tokenizer
from support.endpoint_server import SECRET, Server, llama_cpp_server
from support.processes import run_python
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

import selfpruner_hub.endpoint
from selfpruner_hub.calibration import served_model
from selfpruner_hub.calibration.conversations import Distinct, end_tokens, write_conversations
from selfpruner_hub.calibration.generated_text import continuations, sample_windows
from selfpruner_hub.calibration.served_model import ServedModel, served_by
from selfpruner_hub.errors import EndpointError, UserError
from selfpruner_hub.models.loading import embedded_model, load_model
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.recovery.questions import write_questions

MODEL, TOKENIZER = tiny_model("llama"), chat_tokenizer("chatml")
PROMPTS = [[5], [9, 8, 7, 6, 5, 4], list(range(20, 45))]
SMALL = {"window": 32, "calibration_tokens": 512, "fitness_tokens": 128, "progress": False}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(selfpruner_hub.endpoint, "_FIRST_PAUSE", 0.01)


class Serving(Server):
    """A server of a tiny model, which answers as vLLM does, or in text alone as llama.cpp does."""

    def __init__(self, model=MODEL, tokenizer=TOKENIZER, names=("tiny",), ids=True):
        self.model, self.tokenizer, self.names, self.ids = model, tokenizer, names, ids
        self.turn = threading.Lock()
        super().__init__(self.answer)

    def answer(self, path, body):
        if path.endswith("/models"):
            return {"data": [{"id": name} for name in self.names]}
        banned = [int(token) for token in body.get("logit_bias", {})]
        ends = end_tokens(self.model, self.tokenizer) - set(banned)
        options = {"ends": ends, "banned": banned, "temperature": body["temperature"], "seed": body["seed"]}
        with self.turn:
            (new,) = continuations(self.model, [body["prompt"]], body["max_tokens"], **options)
        stopped = new[-1] in ends
        text = self.tokenizer.decode([token for token in new if token not in ends])
        choice = {"text": text, "finish_reason": "stop" if stopped else "length"}
        if stopped and new[-1] != self.tokenizer.eos_token_id:
            choice["stop_reason"] = new[-1]
        return {"choices": [{**choice, **({"token_ids": new} if self.ids else {})}]}


def served(server, **options):
    return ServedModel(MODEL, TOKENIZER, server.url, environment={}, **options)


def test_it_writes_the_likeliest_text_of_the_model_itself():
    server, ends = Serving(), {40, 41, 42, 60}
    expected = continuations(MODEL, PROMPTS, 20, ends=ends, temperature=0)
    assert continuations(served(server), PROMPTS, 20, ends=ends, temperature=0) == expected
    sent = [body for body in server.bodies if body.get("prompt") in PROMPTS]
    assert len(sent) == len(PROMPTS)
    for body in sent:  # nothing of a server's own: no truncation, no penalty
        assert (body["top_p"], body["top_k"], body["min_p"]) == (1.0, -1, 0.0)
        assert body["repetition_penalty"] == body["repeat_penalty"] == 1.0
    assert len({body["seed"] for body in sent}) == len(PROMPTS)


@pytest.mark.parametrize("ids", [True, False])
def test_conversations_are_the_models_own(ids):
    """Sampled with other random numbers, and of the form that the model itself writes."""
    talks = write_conversations(served(Serving(ids=ids)), TOKENIZER, 4, 0, distinct=Distinct())
    own = write_conversations(MODEL, TOKENIZER, 4, 0, distinct=Distinct())
    assert len(talks) == len(own) == 4
    head = TOKENIZER.encode("<|im_start|>", add_special_tokens=False)
    assert all(list(talk.ids[: len(head)]) == head and any(talk.answered) for talk in talks)
    assert [talk.ids for talk in talks] != [talk.ids for talk in own]


def test_windows_of_plain_text_have_no_end():
    windows = sample_windows(served(Serving()), 5, 24, 3)
    assert windows.shape == (5, 24)
    assert not torch.isin(windows[:, 1:], torch.tensor(sorted(end_tokens(MODEL, TOKENIZER)))).any()
    assert len({tuple(row) for row in windows.tolist()}) == 5


def test_a_server_of_another_model_is_refused():
    other = tiny_model("llama", seed=7)
    with pytest.raises(UserError, match="does not serve this model") as caught:
        continuations(served(Serving(other)), PROMPTS, 4)
    assert "very model" in str(caught.value)


def test_one_of_several_models_must_be_named():
    server = Serving(names=("tiny", "large"))
    with pytest.raises(UserError, match="--writer-model"):
        continuations(served(server), PROMPTS, 4)
    assert len(continuations(served(server, name="tiny"), PROMPTS, 4)) == 3
    assert {body["model"] for body in server.bodies if body} == {"tiny"}
    with pytest.raises(UserError, match="--writer"):
        served_by(None, "tiny", MODEL, TOKENIZER)


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("SELFPRUNER_API_KEY", SECRET)
    server = Server(401)
    with pytest.raises(UserError, match="refuses the key") as caught:
        continuations(ServedModel(MODEL, TOKENIZER, server.url, "m"), PROMPTS, 4)
    assert set(server.keys) == {f"Bearer {SECRET}"}
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("step", [500, "drop", "nonsense", lambda *_: [1, 2], lambda *_: {"choices": []}])
def test_a_server_that_fails_is_one_line(step):
    server = Server(step)
    with pytest.raises(EndpointError, match="did not answer after 4 tries"):
        continuations(served(server, name="m"), PROMPTS, 4)


def test_after_an_error_the_rest_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(served_model, "AT_ONCE", 2)
    server = Serving()
    model = served(server)
    continuations(model, PROMPTS, 4)
    server.bodies.clear()
    server.steps = [400]
    with pytest.raises(EndpointError, match="HTTP 400"):
        continuations(model, [[5]] * 200, 4)
    assert len(server.bodies) < 20


def test_a_run_resumes_without_the_server(tmp_path):
    """What the server wrote is in the run directory; the text is no other one without it."""
    server = Serving(tokenizer=tiny_tokenizer())
    texts = []
    for writer in (server.url, None):
        pruner = AutoPruner(MODEL, tiny_tokenizer(), "tests/llama")
        pruned = pruner.prune(0.3, data="self", writer=writer, run_dir=tmp_path / "run", **SMALL)
        texts.append(pruned.report.data)
    assert texts[0] == texts[1]
    asked = [body for body in server.bodies if "logit_bias" in body]
    assert len(asked) == (512 + 128) // 32


def test_command_line(tmp_path):
    """Both verbs: what is cut with, and what decides and is trained on, is what the server wrote."""
    model, server = save_tiny("llama", tmp_path / "dense"), Serving(tokenizer=tiny_tokenizer())
    given = ("--quiet", "--data", "self", "--writer", server.url, "--writer-model", "tiny")
    few = ("window=32", "calibration_tokens=512", "fitness_tokens=128")
    sets = [word for pair in few for word in ("--set", pair)]
    words = ["prune", model, "--beta", "0.3", "--output", tmp_path / "cut", *given, *sets]
    done = run_python("-m", "selfpruner_hub.cli", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    asked = len([body for body in server.bodies if "logit_bias" in body])
    assert asked == (512 + 128) // 32
    words = ["recover", tmp_path / "cut", "--against", model, "--tokens", "512", *given]
    words += ["--set", "window=32", "--set", "batch_tokens=64"]
    done = run_python("-m", "selfpruner_hub.cli", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len([body for body in server.bodies if "logit_bias" in body]) > asked + 8


@pytest.fixture
def llama_cpp():
    with llama_cpp_server() as url:
        yield url


@pytest.mark.slow
def test_a_real_llama_cpp_server_writes_for_the_real_model(llama_cpp):
    where = {key: value for key, value in embedded_model().items() if key != "base_model"}
    model, tokenizer = load_model(**{**where, "dtype": "float32", "device": "cpu"})
    writer = ServedModel(model, tokenizer, llama_cpp, environment={})
    talks = write_conversations(writer, tokenizer, 4, 0)
    asked = write_questions(writer, tokenizer, 4, 0)
    assert len(talks) + len(asked) >= 7
    ends = [tokenizer.decode(talk.ids[-2:]) for talk in (*talks, *asked)]
    assert sum(end == "<|im_end|>\n" for end in ends) >= 2
    assert all(tokenizer.decode(talk.ids).count("<|im_start|>") == 3 for talk in (*talks, *asked))
