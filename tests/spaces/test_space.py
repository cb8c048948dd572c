"""The Space's modules on a tiny model: what they say, count and refuse."""

from __future__ import annotations

import itertools
import json
import re
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import SpaceCard
from huggingface_hub.errors import HfHubHTTPError
from packaging.requirements import Requirement
from support.hub_server import check_yaml

from selfpruner_hub.hub.space import VENDORED, space_files
from selfpruner_hub.plans.plan import ModelShape, Plan, widths_of
from selfpruner_hub.search.journal import read_journal
from selfpruner_hub.storage.layout import asset
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.heavy
MODULES = [path.stem for path in asset("spaces").glob("*.py")]


# -- the model --------------------------------------------------------------------------------------------------------


def test_the_parent_is_of_the_commit_that_was_pruned(space, monkeypatch, tmp_path):
    """Its branch may have gone on since; a copy that is named has no commit."""
    source = space("model_source")
    monkeypatch.setattr(source, "record", lambda: {"base_model": "some/parent", "base_revision": 40 * "a"})
    shown = source.Shown("some/pruned", None, None, None, None)
    assert (shown.parent, shown.parent_revision) == ("some/parent", 40 * "a")
    assert replace(shown, dense=str(tmp_path)).parent_revision is None
    monkeypatch.setattr(source, "record", lambda: {"base_model": "some/parent"})  # of an earlier version
    assert shown.parent_revision is None


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["pruned", "dense"])
def test_an_answer_streams_and_is_counted(which, space):
    answers = space("answers")
    seen = [(a.text, a.tokens, a.done) for a in answers.answer(which, "a b c d", 12)]
    engine = answers.load(which)
    model, tokenizer = engine.model, engine.tokenizer
    inputs = tokenizer("a b c d", return_tensors="pt")
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    text, tokens, done = seen[-1]
    assert (tokens, done) == (len(expected), True)
    assert text == tokenizer.decode(expected, skip_special_tokens=True)
    assert all(later[0].startswith(earlier[0]) for earlier, later in itertools.pairwise(seen))


def test_speed_is_that_of_the_tokens_after_the_first(space):
    answer = space("answers").Answer("text", tokens=11, first=0.5, seconds=2.5)
    assert answer.rate == 5.0
    assert answer.took() == "**5.0** tokens/s · first token after **0.50 s** · 11 tokens"
    answer.runtime = "llama.cpp, f16, 2 threads"
    assert answer.took().endswith(" · 11 tokens · llama.cpp, f16, 2 threads")
    assert space("answers").Answer(tokens=1, first=0.5, seconds=0.5).rate is None


def test_the_pruned_model_is_compared_with_its_parent(space):
    made, verdict = space("answers").Answer, space("app")._verdict
    quick, slow = made(tokens=101, first=1.0, seconds=6.0), made(tokens=101, first=1.0, seconds=11.0)
    assert verdict(pruned=quick, dense=slow).startswith("The pruned model wrote at **2.00 ×** the speed of its parent")
    assert "**0.50 ×**" in verdict(pruned=slow, dense=quick)
    assert verdict(pruned=quick, dense=made(tokens=1, first=1.0, seconds=1.0)) == ""


def test_a_visitor_who_leaves_stops_the_model(space):
    answers, counts = space("answers"), []
    model = answers.load("pruned").model
    model.register_forward_hook(lambda *_: counts.append(1))
    stream = answers.answer("pruned", "a b c d", 100)
    next(stream)
    next(stream)
    stream.close()
    with answers._writing:  # the thread that writes has ended
        assert 0 < len(counts) < 100


def test_answers_do_not_overlap(space, monkeypatch):
    """Nor with one that was left: it ends before the next one begins, and its time is not the next one's."""
    answers, engine, going = space("answers"), space("answers").load("pruned"), threading.Event()
    inside, write = [], type(engine).write

    def watched(self, ids, tokens, receive):
        inside.append(1)
        assert len(inside) == 1
        time.sleep(0.3 * (not going.is_set()))
        going.set()
        write(self, ids, tokens, receive)
        inside.pop()

    monkeypatch.setattr(type(engine), "write", watched)
    left = answers.answer("pruned", "a b c d", 100)
    next(left)
    left.close()
    started = time.perf_counter()
    *_, last = answers.answer("pruned", "a b c d", 8)
    assert last.done
    assert 0 < last.first < time.perf_counter() - started - 0.1


def test_an_answer_that_takes_too_long_ends(space, monkeypatch):
    answers, clock = space("answers"), itertools.count(0, 50)
    monkeypatch.setattr(answers, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    *_, last = answers.answer("pruned", "a b c d", 100)
    assert 2 <= last.tokens <= 3  # the second came after 100 s; transformers is a token ahead of what it streams


def test_a_prompt_that_the_model_cannot_read(space):
    answers = space("answers")
    with pytest.raises(answers.UnavailableError, match="longer than the model can read"):
        list(answers.answer("pruned", "a" * 200, 8))  # the tiny model reads 128 tokens


def test_an_answer_ends_where_the_model_ends(space):
    answers = space("answers")
    *_, last = answers.answer("pruned", "a" * 120, 100)
    assert last.tokens == 8


def test_a_missing_parent(space, monkeypatch):
    monkeypatch.setenv("DENSE_MODEL", "nobody/nothing")
    answers = space("answers")
    with pytest.raises(answers.UnavailableError, match=r"The model nobody/nothing cannot be loaded: it is missing"):
        answers.load("dense")


def test_a_model_that_is_too_large(space, monkeypatch):
    engines = space("engines")
    monkeypatch.setattr(space("engines.base"), "memory_left", lambda: 50_000.0)
    with pytest.raises(engines.UnavailableError, match="The dense model is too large for this machine"):
        engines.load("dense")


def test_no_path_of_the_machine_is_told(space, saved_model, monkeypatch):
    (saved_model / "model.safetensors").unlink()
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    answers = space("answers")
    with pytest.raises(answers.UnavailableError) as caught:
        answers.load("pruned")
    assert str(caught.value) == "The model model cannot be loaded: it is missing, damaged or out of reach."


def test_a_model_that_fails_while_it_writes(space, monkeypatch):
    answers = space("answers")
    monkeypatch.setattr(answers.load("pruned").model, "generate", lambda **_: 1 / 0)
    with pytest.raises(answers.UnavailableError, match=r"The pruned model failed \(ZeroDivisionError\)"):
        list(answers.answer("pruned", "abc", 8))


# -- facts ------------------------------------------------------------------------------------------------------------


def test_what_was_removed_is_what_the_record_says(space, saved_models):
    record = read_record(saved_models / "first")
    settings, _ = read_journal(saved_models / "first" / "search.jsonl")
    facts = space("record_tables")
    shape = settings["shape"]
    table = facts.removed(record.widths, record.rates, shape)
    whole = table.groupby("layer", sort=False)["removed"].sum().tolist()
    assert whole == pytest.approx([100 * rate for rate in record.rates], abs=1e-3)
    assert whole == pytest.approx([100 * rate for rate in ModelShape.of_record(shape).rates(record.plan)])
    assert facts.removed(record.widths, record.rates, None)["removed"].tolist() == pytest.approx(whole, abs=1e-3)


def test_what_was_removed_of_ffns_without_a_gate(space):
    shape = ModelShape(16, 4, 1, Plan.of([64] * 2, [4] * 2), ffn_matrices=2)
    kept = Plan.of([16, 64], [4, 1])
    table = space("record_tables").removed(widths_of(kept), shape.rates(kept), shape.record())
    whole = table.groupby("layer", sort=False)["removed"].sum().tolist()
    assert whole == pytest.approx([100 * rate for rate in shape.rates(kept)])


def test_the_curve_of_a_search(space):
    facts = space("record_tables")
    journal = [
        {"kind": "header"},
        *({"kind": "score", "share": share, "fitness": f, "origin": o} for share, f, o in SCORES),
    ]
    plans = facts.scored(journal)
    assert plans.to_numpy().tolist() == [[1.5, 0.5, "seed"], [2.5, 0.7, "seed"], [4.5, 0.4, "evolution"]]
    assert facts.best_so_far(plans).to_numpy().tolist() == [[1.5, 0.5], [2.5, 0.5], [4.5, 0.5], [4.5, 0.4]]
    assert len(facts.best_so_far(facts.scored([]))) == 0


SCORES = [
    (0.5, 9.0, "seed:ramp"),
    (1, 0.5, "seed:ramp"),
    (1, 0.7, "seed:uniform"),
    (1, None, "self"),
    (1, 0.4, "evolution"),
]


def test_a_line_that_is_still_being_written_is_passed_over(space):
    assert space("record_tables").lines('{"a": 1}\n{"b": ') == [{"a": 1}]


def test_figures_are_those_of_the_record(space, saved_model, monkeypatch):
    record = json.loads((saved_model / "selfpruner.json").read_text())
    record["metrics"] = {
        "perplexity": {
            "value": 12.5,
            "dense": 10.25,
            "protocol": "44 windows",
            "dataset": "wikitext",
            "date": "2026-11-05",
        },
        "prefill": {"value": 7.5, "dense": None, "protocol": "6 runs", "unit": "ms"},
        "agreement (conversations)": {"value": 0.814, "dense": 0.99, "protocol": "16 conversations"},
        "KL (conversations)": {"value": 0.4, "dense": 0.0, "protocol": "16 conversations"},
        "plain questions kept": {"value": 0.71, "dense": None, "protocol": "150 questions"},
        **record["metrics"],
    }
    (saved_model / "selfpruner.json").write_text(json.dumps(record))
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    said = space("record_tables").figures()
    assert f"| parameters | {record['parameters']['dense']:,} | {record['parameters']['pruned']:,} |" in said
    assert "| perplexity | 10.25 | 12.5 |" in said
    assert "| prefill | – | 7.5 ms |" in said
    assert "* **perplexity**: 44 windows; wikitext; 2026-11-05." in said
    names = ("plain questions kept", "agreement (conv", "KL (conv", "perplexity", "prefill")
    names += ("search fitness", "search logit scale")
    places = [said.index(f"| {name}") for name in names]
    assert places == sorted(places)  # answers, other quality, speed, figures of the search
    assert space("record_tables").quality() == (
        "Of the plain questions that its parent answers, it answers **71 %**. "
        "On **81 %** of the tokens of its parent's answers it chooses the same."
    )
    told = space("record_tables").title()[1]
    places = [told.index(said) for said in ("without retraining", "Of the plain questions", "A search found")]
    assert places == sorted(places)


def test_quality_is_that_of_text_where_no_answers_were_measured(space, saved_model, monkeypatch):
    record = json.loads((saved_model / "selfpruner.json").read_text())
    record["metrics"]["perplexity (512)"] = {"value": 12.53, "dense": 10.25, "protocol": "44 windows"}
    (saved_model / "selfpruner.json").write_text(json.dumps(record))
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    assert space("record_tables").quality() == "Its perplexity on text is **12.53**, its parent's 10.25."


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ("self:mutation", "The model itself proposed how much each layer can lose."),
        ("evolution:mutation", "A search found how much each"),
        ("seed:refined", "Measurements of its layers say how much each"),  # also where a search found nothing better
        ("seed:uniform", "All layers lose the same share."),
    ],
)
def test_who_chose_is_told_as_it_was(origin, said, space, saved_model, monkeypatch):
    path = saved_model / "selfpruner.json"
    record = json.loads(path.read_text())
    record["proposer"] |= {"name": "self", "best_from": origin}
    path.write_text(json.dumps(record))
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    assert said in space("record_tables").title()[1]


def test_a_mixture_loses_experts(space, saved_model, monkeypatch):
    tables, path = space("record_tables"), saved_model / "selfpruner.json"
    shape = {"group_weights": 0, "expert_weights": 10, "num_experts": [4, 0], "num_key_value_heads": [2, 2]}
    rows = tables.removed({"num_experts": [3, 0], "num_key_value_heads": [2, 2]}, (), shape)
    assert rows.values.tolist() == [["1", "experts", 25.0], ["2", "experts", 0.0]]
    record = json.loads(path.read_text())
    record["widths"]["num_experts"] = record["widths"].pop("intermediate_size")
    path.write_text(json.dumps(record))
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    assert "of the weights of its routed experts without" in tables.title()[1]


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "private or gated, and the secret HF_TOKEN"), (403, "private or gated"), (404, "it is not on the Hub")],
)
def test_why_a_model_cannot_be_loaded(status, said, space):
    """Also where transformers wraps what the Hub said."""
    hub = HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "https://hub")))
    wrapped = OSError("no")
    wrapped.__cause__ = hub
    for error in (hub, wrapped):
        assert said in space("model_source").cannot_be_loaded("me/model", error)


def test_files_that_were_read_leave_their_memory(space, monkeypatch, tmp_path):
    """A container counts them as used."""
    base = space("engines.base")
    for name, text in (
        ("memory.max", "1000\n"),
        ("memory.current", "900\n"),
        ("memory.stat", "anon 200\ninactive_file 600\n"),
    ):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(base, "Path", lambda *_: tmp_path)
    assert base.memory_left() == 700
    (tmp_path / "memory.max").write_text("max\n")
    assert base.memory_left() > 1000


def test_training_after_pruning_is_told(space, saved_model, monkeypatch):
    record = json.loads((saved_model / "selfpruner.json").read_text())
    record["method"]["training"] = "LoRA, 100 steps"
    (saved_model / "selfpruner.json").write_text(json.dumps(record))
    monkeypatch.setenv("PRUNED_MODEL", str(saved_model))
    assert "of the weights of its layers and was then trained (LoRA, 100 steps). " in space("record_tables").title()[1]


# -- live -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def live(space, monkeypatch):
    module = space("live_pruning")
    monkeypatch.setattr(module, "TEXT", {**module.TEXT, "window": 32, "calibration_tokens": 256, "fitness_tokens": 64})
    return module


def test_pruning_live(live, dense):
    runs = [(run.stage, len(run.journal)) for run in live.prune(0.3, 8, "evolution")]
    assert runs[0] == ("loading the model", 0)
    (run,) = itertools.islice((r for r in live.prune(0.3, 8, "evolution") if r.pruned), 1)
    assert run.pruned.report.achieved_beta == pytest.approx(0.3, abs=0.01)
    widths, fitness = live.best(run)
    assert widths == run.pruned.report.widths
    assert fitness == pytest.approx(run.pruned.report.metrics["search_fitness"].value, abs=1e-5)
    assert live.removed_by_best(run)["removed"].sum() > 0
    assert isinstance(live.sample(run), str)
    assert not live.busy.locked()


def test_one_at_a_time(live):
    first = live.prune(0.3, 8, "evolution")
    next(first)
    assert live.busy.locked()
    with pytest.raises(live.UnavailableError, match="Someone else is pruning"):
        next(live.prune(0.3, 8, "evolution"))
    first.close()
    assert live.busy.acquire(timeout=60)  # the run ends by itself
    live.busy.release()


def test_a_visitor_who_leaves_keeps_nobody_waiting(live, monkeypatch):
    """Gradio closes what it watches on its event loop, where a wait stops the page for all."""
    loading, go = threading.Event(), threading.Event()

    def load():
        loading.set()
        assert go.wait(60)
        return SimpleNamespace(prune=lambda *_, progress, **__: progress("searching", 1, 2))

    monkeypatch.setattr(live, "_pruner", load)
    first = live.prune(0.3, 8, "evolution")
    run = next(first)
    assert loading.wait(60)
    first.close()
    assert live.busy.locked()
    go.set()
    assert live.busy.acquire(timeout=60)
    live.busy.release()
    assert isinstance(run.error, live._StoppedError)


def test_pruning_that_takes_too_long(live, monkeypatch):
    class Endless:
        def prune(self, beta, progress, **_):
            while True:
                progress("searching", 1, 2)
                time.sleep(0.01)

    monkeypatch.setattr(live, "PRUNING_SECONDS", 0)
    monkeypatch.setattr(live, "_pruner", Endless)
    with pytest.raises(live.UnavailableError, match="Stopped after 0 s"):
        list(live.prune(0.3, 16, "evolution"))


def test_no_two_models_are_loaded_at_once(live, space, monkeypatch):
    """Each would see, and then keep, the default dtype that the other set."""
    engines = space("engines")

    def prune(*_args, **_kwargs):
        assert not engines.load_lock.locked()

    def load():
        assert engines.load_lock.locked()
        return SimpleNamespace(prune=prune)

    monkeypatch.setattr(live, "_pruner", load)
    *_, last = live.prune(0.3, 8, "evolution")
    assert last.error is None
    monkeypatch.setattr(engines, "_load", lambda _which: load())
    engines.load("dense")


def test_a_large_parent_has_a_stand_in(live, monkeypatch):
    assert live.name().endswith("dense")
    monkeypatch.setattr(live, "SMALL", 1_000)
    assert live.name() == live.STAND_IN


def test_without_the_package(live, monkeypatch):
    monkeypatch.setitem(sys.modules, "selfpruner_hub", None)
    with pytest.raises(live.UnavailableError, match="needs the package selfpruner-hub"):
        list(live.prune(0.3, 8, "evolution"))


# -- the page ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("", "Type a prompt first."),
        (" \n", "Type a prompt first."),
        ("x" * 2001, "The prompt has 2,001 characters; at most 2,000 are taken. Shorten it."),
        ("x" * 2000, ""),
    ],
    ids=["empty", "blank", "too long", "just right"],
)
def test_prompts_are_bounded(prompt, wrong, space):
    app = space("app")
    assert [found["message"] for found in app.check(prompt, 64)] == [wrong, ""]
    if wrong:  # whoever passes by the page meets the same bound
        with pytest.raises(Exception, match=re.escape(wrong)):
            next(app.compare(prompt, 64))


@pytest.mark.parametrize("tokens", [0, -1, 0.5, None, float("nan")])
def test_an_answer_has_at_least_one_token(tokens, space):
    """The slider gives none of these; the API may."""
    app = space("app")
    wrong = "Ask for 1 to 256 tokens."
    assert [found["message"] for found in app.check("abc", tokens)] == ["", wrong]
    assert not app.check("abc", tokens)[1]["is_valid"]
    with pytest.raises(Exception, match=wrong):
        next(app.compare("abc", tokens))


def test_one_token_is_an_answer_and_more_than_the_most_are_cut(space, monkeypatch):
    monkeypatch.setattr(space("answers"), "MOST_TOKENS", 12)
    for asked, written in ((1, 1), (100_000, 12)):
        assert list(space("app").compare("abc", asked))[-1][1].count(f" · {written} tokens · PyTorch, ") == 1


def test_what_a_visitor_types_is_told_to_nobody(space, capfd, caplog, tmp_path, monkeypatch):
    """A prompt that is answered leaves no trace on the terminal, in the log, or in a file."""
    caplog.set_level("DEBUG")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    *_, (pruned, *_) = space("app").compare("a walrus called Bartholomew", 8)
    assert pruned
    said = capfd.readouterr()
    assert "Bartholomew" not in said.out + said.err + caplog.text
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_both_answers_then_the_verdict(space):
    seen = list(space("app").compare("abc", 8))
    assert seen[0] == ("", "loading the model …", "", "waiting for the pruned model to finish …", "")
    pruned, pruned_took, dense, dense_took, verdict = seen[-1]
    assert pruned
    assert dense
    assert "8 tokens" in pruned_took
    assert "8 tokens" in dense_took
    assert re.fullmatch(r"The pruned model wrote at \*\*\d+\.\d\d ×\*\* the speed of its parent, .*", verdict)
    first_dense = next(i for i, out in enumerate(seen) if out[2])
    assert all(out[0] == pruned for out in seen[first_dense:])  # one after the other


def test_the_pruned_model_answers_where_the_parent_is_missing(space, monkeypatch):
    monkeypatch.setenv("DENSE_MODEL", "nobody/nothing")
    pruned, _, dense, said, verdict = list(space("app").compare("abc", 8))[-1]
    assert pruned
    assert (dense, verdict) == ("", "")
    assert said.startswith("⚠️ The model nobody/nothing cannot be loaded")


def test_a_page_without_a_model(space, monkeypatch):
    for name in ("nobody/nothing", ""):
        monkeypatch.setenv("PRUNED_MODEL", name)
        for module in MODULES:
            sys.modules.pop(module, None)
        page = space("app").build()
        (said,) = [block.value for block in page.blocks.values() if getattr(block, "value", None)]
        assert said.startswith("# There is no model to show yet")


# -- many visitors ----------------------------------------------------------------------------------------------------

WAITING = 32
"""Visitors whom the page lets wait, beside the one who is answered."""


class Writer:
    """A model that writes for as long as it is told to, and counts who is answered at once."""

    def __init__(self, answers):
        self.go_on = threading.Event()
        self.at_once, self.most, self.answered = 0, 0, 0
        self._lock, self._answer = threading.Lock(), answers.Answer

    def __call__(self, which, prompt, tokens):
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        yield self._answer()
        self.go_on.wait(PATIENCE)
        time.sleep(0.02)  # so that another would come between, if it could
        with self._lock:
            self.at_once -= 1
            self.answered += 1
        yield self._answer("text", 9, 0.1, 0.2, True)


PATIENCE = 300
"""Seconds that a visitor waits in these tests, on a busy machine."""


@pytest.fixture
def visited(space, monkeypatch):
    """The page, served; gives a client of it, and the writer in the place of both models."""
    client = pytest.importorskip("gradio_client", reason='needs pip install -e ".[space]"')
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    app, answers = space("app"), space("answers")
    writer = Writer(answers)
    monkeypatch.setattr(space("engines"), "load", lambda which: None)
    monkeypatch.setattr(answers, "answer", writer)
    page = app.build()
    _, url, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=False)
    yield client.Client(url, verbose=False, max_workers=2 * WAITING), writer
    writer.go_on.set()
    page.close(verbose=False)


def ask(client):
    return client.submit("a question", 16, api_name="/compare")


def until(true):
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_one_visitor_is_answered_at_a_time(visited):
    """Two that write at once would each seem slow."""
    client, writer = visited
    writer.go_on.set()
    for job in [ask(client) for _ in range(6)]:
        assert "speed of its parent" in job.result(PATIENCE)[-1]
    assert writer.answered == 12  # by both models
    assert writer.most == 1


def test_a_full_queue_is_told_and_the_visitor_after_it_is_answered(visited):
    client, writer = visited
    jobs = [ask(client)]
    until(lambda: writer.at_once)

    def comes():
        job = ask(client)
        until(lambda: job.status().code.name == "IN_QUEUE" or job.done())
        return job

    jobs += [comes() for _ in range(WAITING)]
    for _ in range(3):
        late = comes()
        assert late.done(), "one more waits than may"
        with pytest.raises(Exception, match="full"):
            late.result(0)
    assert not any(job.done() for job in jobs)
    writer.go_on.set()
    for job in jobs:
        assert "speed of its parent" in job.result(PATIENCE)[-1]
    assert "speed of its parent" in ask(client).result(PATIENCE)[-1]
    assert writer.most == 1


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_requirements_are_those_of_the_package():
    """The Space carries the package itself, so it needs what the package needs."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = {str(Requirement(line)) for line in project["dependencies"]}
    lines = (asset("spaces") / "requirements.txt").read_text().split("\n")
    assert {str(Requirement(line)) for line in lines if line} == ours


def test_the_front_page_is_valid(saved_models):
    record = read_record(saved_models / "first")
    page = space_files(record, "me/tiny-b30")["README.md"].decode()
    card = SpaceCard(page)
    assert check_yaml(page) == []
    assert (card.data.sdk, card.data.app_file) == ("gradio", "app.py")
    assert card.data.models == ["me/tiny-b30", "tests/llama"]
    assert card.data.python_version == "3.12"  # what ZeroGPU has; the default is too old for transformers 5
    assert card.data.title == "tiny-b30 beside its parent"


def test_the_front_page_names_the_gradio_that_was_tested():
    gradio = pytest.importorskip("gradio", reason='needs pip install -e ".[space]"')
    card = SpaceCard((asset("spaces") / "README.md").read_text())
    assert card.data.sdk_version.split(".")[:2] == gradio.__version__.split(".")[:2]


def test_every_module_of_the_app_is_published(saved_models):
    files = space_files(read_record(saved_models / "first"), "me/tiny")
    app = asset("spaces")
    assert {path.relative_to(app).as_posix() for path in app.rglob("*.py")} <= set(files)
    assert not [name for name in files if "__pycache__" in name]
    assert "selfpruner_hub/search/llm/templates/mutation.txt" in files
    root = Path(__file__).parents[2]
    ours = [path for package in VENDORED for path in (root / package).rglob("*.py")]
    assert {path.relative_to(root).as_posix() for path in ours} == {
        name for name in files if name.partition("/")[0] in VENDORED and name.endswith(".py")
    }
    assert all(Path(source).is_file() for source in files.values() if isinstance(source, Path))
