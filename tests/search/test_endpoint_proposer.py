"""A proposer behind an OpenAI-compatible endpoint: a server that fails in every way, and a real llama.cpp server."""

from __future__ import annotations

import json
import os

import huggingface_hub.constants
import numpy as np
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from support.endpoint_server import SECRET, Server, llama_cpp_server
from support.processes import run_python
from support.tiny import save_tiny, tiny_model, tiny_tokenizer

import selfpruner_hub.endpoint
import selfpruner_hub.search.llm.endpoint_proposer as module
from selfpruner_hub.errors import UserError
from selfpruner_hub.plans.budget import Budget
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.seeds import seeds
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.search.journal import Journal
from selfpruner_hub.search.llm.endpoint_proposer import EndpointProposer
from selfpruner_hub.search.loop import Problem, search
from selfpruner_hub.search.proposers import Scored
from selfpruner_hub.settings import EndpointOptions, SearchSchedule

pytestmark = pytest.mark.heavy
BUDGET = Budget(ModelShape(32, 4, 2, Plan.of([48] * 4, [4] * 4)), 0.3)
GOOD = json.dumps({"attention": [0, 25, 0, 25], "ffn": [30, 20, 40, 25]})


@pytest.fixture(autouse=True)
def online_and_quick(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(selfpruner_hub.endpoint, "_FIRST_PAUSE", 0.01)


def ask(server: Server, count: int = 1, **options):
    plan = BUDGET.project(seeds(BUDGET)["uniform"])
    history = [Scored(plan, BUDGET.rates(plan), 1.5, 1.0, "seed:uniform", 0)]
    proposer = EndpointProposer(
        server.url, "m", BUDGET, "tests/m", EndpointOptions(**options), environment={"SELFPRUNER_API_KEY": SECRET}
    )
    return proposer.ask("mutation", history, count, np.random.default_rng(0))


def test_a_good_reply_and_what_was_sent():
    server = Server(GOOD)
    replies = ask(server, 3)
    assert [r.rates.ffn for r in replies] == [(0.3, 0.2, 0.4, 0.25)] * 3
    assert {r.tokens for r in replies} == {100}
    body = server.bodies[0]
    assert body["response_format"]["type"] == "json_schema"
    assert set(body["response_format"]["json_schema"]["schema"]["properties"]) == {"parents", "attention", "ffn"}
    assert "1.5000" in body["messages"][0]["content"]
    assert len({b["seed"] for b in server.bodies}) == 3
    assert set(server.keys) == {f"Bearer {SECRET}"}


@pytest.mark.parametrize("failure", [429, 500, 503, "drop"])
def test_a_passing_failure_is_tried_again(failure):
    server = Server(failure, failure, GOOD)
    assert ask(server)[0].rates is not None
    assert len(server.bodies) == 3


def test_a_lasting_failure_is_a_refusal_without_secrets():
    server = Server(500)
    (reply,) = ask(server)
    assert reply.rates is None
    assert "did not answer after 4 tries" in reply.error
    assert SECRET not in repr(reply)


@pytest.mark.parametrize(("status", "says"), [(401, "refuses the key"), (403, "refuses the key"), (404, "no model")])
def test_what_a_retry_cannot_mend_is_said_at_once(status, says):
    server = Server(status)
    with pytest.raises(UserError, match=says) as caught:
        ask(server)
    assert len(server.bodies) == 1
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_not_sent_again(status):
    """It would be refused again: of the limit of requests, one is spent."""
    server = Server(status, GOOD)
    (reply,) = ask(server)
    assert reply.rates is None
    assert reply.error == f"The endpoint refuses the request (HTTP {status})."  # it is journaled, and published
    assert len(server.bodies) == 1


@pytest.mark.parametrize("where", ["/{}/v1", "/v1?api_key={}"])
def test_a_key_in_the_address_is_in_nothing_that_is_kept(where, tmp_path):
    """Neither in the journal, which the record and the card are made from, nor in those; and no host either."""
    server = Server(GOOD)
    host = server.url.removesuffix("/v1")
    pruned = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
        0.3, data="self", proposer=f"{host}{where.format(SECRET)}", proposer_model="m", window=32,
        calibration_tokens=512, fitness_tokens=128, evaluations=3, seeds=("uniform",), run_dir=tmp_path / "run",
        progress=False,
    )  # fmt: skip
    pruned.save_pretrained(tmp_path / "model")
    assert server.bodies
    assert pruned.report.proposer["name"] == "m behind an OpenAI-compatible endpoint"
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"search.jsonl", "selfpruner.json", "README.md"} <= {path.name for path in kept}
    secrets = (SECRET.encode(), host.removeprefix("http://").encode())
    assert not [path for path in kept if any(secret in path.read_bytes() for secret in secrets)]


@pytest.mark.parametrize(
    "text", ["", "I cannot do that.", '{"ffn": [1]}', GOOD[:-20], '{"attention": null, "ffn": {}}']
)
def test_nonsense_is_a_refusal(text):
    (reply,) = ask(Server(text))
    assert reply.rates is None
    assert reply.error
    assert reply.reply == text


def test_limits_of_requests_and_tokens():
    server = Server(GOOD)
    assert sum(r.rates is not None for r in ask(server, 12, request_limit=5)) <= 5
    assert len(server.bodies) == 5
    assert sum(r.rates is not None for r in ask(Server(GOOD), 40, token_limit=500)) < 10


def test_a_resumed_search_counts_on(tmp_path):
    """The first ask takes all tokens; the journal ends after it, as that of a killed search."""
    server = Server(GOOD)
    for _ in range(2):
        AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
            0.3, data="self", proposer=server.url, proposer_model="m", window=32, calibration_tokens=512,
            fitness_tokens=128, evaluations=3, seeds=("uniform",), run_dir=tmp_path, progress=False,
            repair="output", proposer_options={"token_limit": 800},
        )  # fmt: skip
        assert len(server.bodies) == 8
        lines = (tmp_path / "search.jsonl").read_text().splitlines(keepends=True)
        first = next(number for number, line in enumerate(lines) if '"kind": "ask"' in line)
        (tmp_path / "search.jsonl").write_text("".join(lines[: first + 1]))


def test_keys_go_to_their_own_hosts_only(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    environment = {"HF_TOKEN": "hf_planted", "OPENAI_API_KEY": SECRET}
    server = Server(GOOD)
    proposer = EndpointProposer(server.url, "m", BUDGET, "tests/m", EndpointOptions(), environment=environment)
    proposer.ask("initial", [], 1, np.random.default_rng(0))
    assert server.keys == ["Bearer none"]


@pytest.mark.parametrize(
    "url", ["ftp://host/v1", "http://", "https://user:pass@host/v1", "http://[bad", "http://host:x"]
)
def test_bad_urls(url):
    with pytest.raises(UserError, match="URL"):
        EndpointProposer(url, "m", BUDGET, "x", EndpointOptions())


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="--proposer-model"):
        EndpointProposer("http://127.0.0.1:1/v1", None, BUDGET, "x", EndpointOptions())


def test_offline_mode_is_explained(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OfflineModeIsEnabled("offline")

    monkeypatch.setattr(module._Client, "chat_completion", refuse)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        ask(Server(GOOD))


def test_a_search_by_a_server_that_only_talks_nonsense_ends_well(tmp_path):
    proposer = EndpointProposer(
        Server("Sure! Here you go.").url, "m", BUDGET, "tests/m", EndpointOptions(), environment={}
    )
    target = BUDGET.project(seeds(BUDGET)["ramp"])

    def score(plan: Plan, _share: float) -> float:
        pairs = zip(plan.layers, target.layers, strict=True)
        return float(sum(abs(a.intermediate_size - b.intermediate_size) for a, b in pairs))

    problem = Problem(BUDGET, {"uniform": seeds(BUDGET)["uniform"]}, score)
    schedule = SearchSchedule(evaluations=12, population=4, crossover=4, mutation=4, first_share=1.0)
    found = search(proposer, problem, Journal(tmp_path, {}), schedule)
    assert found.counts["refused"] >= 8
    assert found.counts["replaced"] >= 4
    assert found.best.fitness <= score(BUDGET.project(seeds(BUDGET)["uniform"]), 1.0)


@pytest.fixture
def llama_cpp():
    with llama_cpp_server() as url:
        yield url


@pytest.mark.slow
def test_command_line_with_a_real_llama_cpp_server(llama_cpp, tmp_path):
    """SmolLM2 behind llama.cpp proposes the rates of a (small) other model, over HTTP, held to the schema."""
    model = save_tiny("llama", tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    words = ["prune", model, "--beta", "0.3", "--quiet", "--json", "--output", tmp_path / "out", "--data", text]
    words += ["--proposer", llama_cpp, "--proposer-model", "smollm2", "--evaluations", "7"]
    few = {
        "window": 32,
        "calibration_tokens": 2048,
        "fitness_tokens": 512,
        "schedule.population": 3,
        "schedule.crossover": 3,
        "schedule.mutation": 0,
    }
    words += [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {"SELFPRUNER_API_KEY": SECRET}
    done = run_python("-m", "selfpruner_hub.cli", *words, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["proposer"]["replies"]["accepted"] >= 4
    assert report["proposer"]["tokens"] > 500
    records = [json.loads(line) for line in (tmp_path / "out" / "search.jsonl").read_text().splitlines()]
    asked = [
        r
        for record in records
        if record["kind"] == "ask" and "smollm2" in record["proposer"]
        for r in record["replies"]
    ]
    assert sum(r["rates"] is not None for r in asked) >= 0.8 * len(asked) > 0  # the server holds it to the schema
    assert all(SECRET not in path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())
    assert SECRET not in done.stderr
