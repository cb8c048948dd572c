"""The command line: results on stdout, and for every mistake one line on stderr, status 2 and nothing half-written."""

import errno
import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import fields

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.tiny import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from selfpruner_hub import PrunedModel
from selfpruner_hub.calibration.corpus import consecutive_windows
from selfpruner_hub.cli import main
from selfpruner_hub.evaluation.fitness import Fitness
from selfpruner_hub.evaluation.metrics import perplexity
from selfpruner_hub.hub import parent
from selfpruner_hub.settings import PruneSettings, SearchSchedule
from selfpruner_hub.storage.model_record import Record, read_record

SMALL = [
    *("--set", "calibration_tokens=320", "--set", "fitness_tokens=128", "--set", "window=32"),
    *("--set", 'seeds=["uniform", "ramp"]', "--proposer", "evolution", "--evaluations", "3", "--quiet"),
]
FILES = {
    *("model.safetensors", "config.json", "generation_config.json", "modeling_selfpruned.py"),
    *("selfpruner.json", "search.jsonl", "README.md", "tokenizer.json", "tokenizer_config.json"),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other take several times as long as the tiny models do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny("llama", tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcdefgh ", k=4000)))
    return path


@pytest.fixture(scope="module")
def pruned(dense, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("models") / "pruned"
    assert main(["prune", str(dense), "--beta", "0.3", "--output", str(output), "--data", str(text), *SMALL]) == 0
    return output


@pytest.fixture
def run(capsys):
    """Run the command line in this process and give back (exit status, stdout, stderr)."""

    def run(*arguments):
        capsys.readouterr()
        status = main(list(map(str, arguments)))
        return status, *capsys.readouterr()

    return run


def prune(dense, output, text, *more, beta=0.3):
    """The words of a small `prune`; later words replace earlier ones."""
    return ["prune", dense, f"--beta={beta}", "--output", output, "--data", text, *SMALL, *more]


def names(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


def cut(directory, copy):
    """A copy of a saved model whose weights end half-way."""
    shutil.copytree(directory, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    return copy


# -- what works -------------------------------------------------------------------------------------------------------


def test_prune_writes_everything_and_leaves_no_run_directory(run, dense, text, tmp_path):
    status, out, err = run(*prune(dense, tmp_path / "small", text))
    record = read_record(tmp_path / "small")
    assert (status, err) == (0, "")
    first, second, third = out.splitlines()
    assert first == f"{tmp_path / 'small'}: {record.parameters['pruned']:,} of 39,584 parameters, β = 0.3000"
    own, unseen = ("{:.4f} -> {:.4f}".format(*record.proposer["gains"][t]) for t in ("search_text", "unseen_text"))
    assert second == f"search: kl {own} from the best seed on; on unseen text, {unseen}"
    assert third == record.search_verdict
    assert third.startswith("The search ")
    assert names(tmp_path) == {"small", *(f"small/{name}" for name in FILES)}


def test_no_file_tells_a_path_of_this_host(pruned, dense):
    for path in pruned.iterdir():
        assert str(dense.parent).encode() not in path.read_bytes(), path.name


def test_a_directory_is_called_by_the_repository_that_it_is_a_copy_of(run, dense, text, tmp_path, monkeypatch):
    small, theirs = tmp_path / "small", tmp_path / "theirs.md"
    theirs.write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(parent, "hf_hub_download", lambda name, file: {"some/parent": theirs}[name])
    assert run(*prune(dense, small, text, "--base-model", "some/parent"))[0] == 0
    card = ModelCard.load(small / "README.md").data
    assert (card.base_model, card.license) == ("some/parent", "mit")
    assert read_record(small).base_model == "some/parent"


@pytest.mark.parametrize("name", ["parent", "some/where/else", "/some/parent", "some parent/x"])
def test_a_base_model_that_names_no_repository(name, run, dense, text, tmp_path):
    status, _, err = run(*prune(dense, tmp_path / "small", text, "--base-model", name))
    assert (status, len(err.splitlines())) == (2, 1)
    assert f"base_model must name a Hub repository, OWNER/NAME; got {name!r}" in err


def test_prune_as_json_is_the_record(run, dense, text, tmp_path):
    status, out, err = run(*prune(dense, tmp_path / "small", text, "--json"))
    printed = json.loads(out)
    assert (status, err) == (0, "")
    assert printed.pop("output") == str(tmp_path / "small")
    assert set(printed) == {f.name for f in fields(Record)}
    assert Record.from_json(json.dumps(printed), "stdout") == read_record(tmp_path / "small")


def test_evaluate_measures_the_saved_model(run, pruned, text):
    status, out, err = run("evaluate", pruned, "--data", text, "--window", 32, "--json", "--quiet")
    printed = json.loads(out)
    again = PrunedModel.from_pretrained(pruned)
    windows = consecutive_windows(str(text), again.tokenizer, 32).windows
    assert (status, err) == (0, "")
    (metric,) = printed["metrics"].values()
    assert math.isclose(metric["value"], perplexity(again.model, windows), abs_tol=5e-4)
    assert (metric["dataset"], metric["dense"]) == ("text.txt", None)
    assert "125 consecutive windows of 32 tokens" in metric["protocol"]


def test_evaluate_beside_the_parent_and_save(run, dense, pruned, text, tmp_path):
    copy = shutil.copytree(pruned, tmp_path / "copy")
    words = ["--data", text, "--window", 32, "--windows", 8, "--quiet"]
    status, out, _ = run("evaluate", copy, *words, "--against", dense, "--save")
    assert status == 0
    metric = read_record(copy).metrics["perplexity (32)"]
    windows = consecutive_windows(str(text), tiny_tokenizer(), 32, 8).windows
    parent = AutoModelForCausalLM.from_pretrained(dense)
    assert math.isclose(metric.dense, perplexity(parent, windows), abs_tol=5e-4)
    assert f"{metric.value:g}, dense {metric.dense:g}" in out
    assert f"| perplexity (32) | {metric.dense} | {metric.value} |" in (copy / "README.md").read_text()
    assert run("evaluate", dense, *words, "--save")[0] == 2  # its parent has no record


def test_windows_are_no_longer_than_what_the_model_was_made_to_read(run, dense, text):
    status, out, _ = run("evaluate", dense, "--data", text, "--windows", 4, "--quiet")
    assert status == 0
    assert out.startswith("perplexity (128) ")
    assert "4 consecutive windows of 128 tokens" in out


def test_evaluate_for_people(run, dense, text):
    status, out, _ = run("evaluate", dense, "--data", text, "--window", 32, "--windows", 4, "--quiet")
    assert status == 0
    assert out.startswith("perplexity ")
    assert "text.txt: 4 consecutive windows" in out


def test_progress_goes_to_stderr(run, dense, text, tmp_path):
    words = prune(dense, tmp_path / "small", text, "--json")
    words.remove("--quiet")
    status, out, err = run(*words)
    assert status == 0
    assert json.loads(out)["beta"] == 0.3
    assert "searching" in err


def test_a_run_directory_of_ones_own_stays_and_is_resumed(run, dense, text, tmp_path):
    words = prune(dense, tmp_path / "small", text, "--run-dir", tmp_path / "run")
    assert run(*words)[0] == 0
    journal = (tmp_path / "run" / "search.jsonl").read_bytes()
    assert journal == (tmp_path / "small" / "search.jsonl").read_bytes()
    assert run(*words)[0] == 0
    assert (tmp_path / "run" / "search.jsonl").read_bytes() == journal


def test_only_our_own_file_of_the_default_run_directory_is_removed(run, dense, text, tmp_path):
    (tmp_path / "small.run").mkdir()
    (tmp_path / "small.run" / "notes.txt").write_text("mine")
    assert run(*prune(dense, tmp_path / "small", text))[0] == 0
    assert names(tmp_path / "small.run") == {"notes.txt"}


def test_where_recovery_fails_the_run_directory_stays_and_is_resumed(run, dense, text, tmp_path, monkeypatch, caplog):
    def fail(*_arguments, **_named):
        raise MemoryError

    monkeypatch.setattr(PrunedModel, "recover", fail)
    words = prune(dense, tmp_path / "small", text, "--recover", "1")
    assert run(*words)[0] == 0
    assert "pruned, and not recovered" in caplog.text
    assert {"search.jsonl", "stages"} < names(tmp_path / "small.run")
    monkeypatch.setattr(PrunedModel, "recover", lambda pruned, *_arguments, **_named: pruned)
    assert run(*words)[0] == 0
    assert names(tmp_path) == {"small", *(f"small/{name}" for name in FILES)}


def test_the_output_may_be_the_current_directory(run, dense, text, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(*prune(dense, ".", text))[0] == 0
    assert names(tmp_path) == {"here", *(f"here/{name}" for name in FILES)}


QUICK = """
import sys, time
from selfpruner_hub.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as stopped:  # argparse, after its help or a mistake that it finds
    status = stopped.code
assert not {"torch", "transformers"} & set(sys.modules), "slow"
assert time.process_time() < 0.5, time.process_time()
sys.exit(status)
"""


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--help"], 0, "measure what each layer can lose"),
        (["prune", "--help"], 0, "usage: selfpruner prune"),
        (["demo", "--help"], 0, "usage: selfpruner demo"),
        (["settings"], 0, "calibration_tokens=73728"),
        (
            ["prune", "m", "--output", "o", "--beta", "0.3", "--proposer-option", "temperature"],
            2,
            "--proposer-option expects NAME=VALUE; got 'temperature'.",
        ),
        (["prune"], 2, "the following arguments are required: MODEL, --output"),
        (["prune", "model", "--output", "out"], 2, "one of the arguments --beta --target is required"),
        (["prune", "m", "--output", "o", "--beta", "0.3", "--target", "memory=0.5"], 2, "not allowed with"),
        (
            ["prune", "model", "--output", "out", "--target", "speedup=1"],
            2,
            "A target's speedup must be above 1; got 1.",
        ),
        (
            ["prune", "m", "--output", "o", "--target", "memory=0.5", "--request", "9"],
            2,
            "--request expects two numbers",
        ),
        (
            ["prune", "m", "--output", "o", "--beta", "0.3", "--runtime", "onnx"],
            2,
            "runtime and request say how a target is measured, and none is given.",
        ),
        (["prune", "m", "--output", "o", "--beta", "0.3", "--request", "9+9"], 2, "and none is given."),
        (["prune", "m", "--output", "o", "--beta", "0.3", "--python", "bin/python"], 2, "and none is given."),
        (["prune", "model", "--output", "out", "--beta", "2"], 2, "beta must satisfy 0 < beta < 1; got 2."),
        (["prune", "model", "--output", "out", "--beta", "0.3", "--set", "windows=3"], 2, "Unknown setting windows."),
        (["prune", "model", "--output", "out", "--beta", "0.3", "--seed", "-1"], 2, "seed must be a whole number"),
        (
            ["prune", "m", "--output", "o", "--beta", "0.3", "--writer", "ftp://x"],
            2,
            "The URL of an endpoint must be http",
        ),
        (["recover", "m", "--against", "d", "--tokens", "9", "--writer-model", "x"], 2, "a server that is not given."),
        (["evaluate", "model", "--limit", "0"], 2, "--limit expects a whole number above 0; got 0."),
        (["export", "model", "--to", "onyx", "--output", "out"], 2, "Unknown format 'onyx'. Choose onnx, tensorrt"),
        (["benchmark", "model", "--against", "dense", "--runs", "0"], 2, "--runs expects a whole number; got '0'."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_take_no_time(words, status, said, tmp_path):
    """In a process of its own: without torch, and in under half a second of processor time."""
    done = subprocess.run(
        [sys.executable, "-c", QUICK, *words], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == status, done.stderr
    assert said in (done.stderr if status else done.stdout)
    assert (done.stdout if status else done.stderr) == ""
    assert not names(tmp_path)


EMPTY = {
    "prune": ["prune", "model", "--beta", "0.3"],
    "export": ["export", "model", "--to", "onnx"],
    "benchmark": ["benchmark", "model", "--against", "dense"],
    "plot": ["plot", "model"],
    "demo": ["demo"],
    "recover": ["recover", "model", "--against", "dense", "--minutes", "1"],
}


@pytest.mark.parametrize("verb", EMPTY)
def test_an_output_without_a_name_is_refused(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main([*EMPTY[verb], "--output", ""])
    assert stopped.value.code == 2
    assert "argument --output: expects a path" in capsys.readouterr().err
    assert not names(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "missing", "--beta", "0.3", "--output", "out"],
        ["evaluate", "missing"],
        ["export", "missing", "--to", "gguf", "--output", "out"],
        ["verify", "missing"],
        ["benchmark", "missing", "--against", "missing"],
        ["push", "missing", "me/model"],
        ["recover", "saved", "--against", "missing", "--minutes", "1"],
    ],
    ids=lambda words: words[0],
)
def test_bars_of_transformers_are_off_before_a_model_is_loaded(words, pruned, tmp_path, monkeypatch):
    """They would hide our own progress."""
    logging.enable_progress_bar()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pruned, "saved")
    assert main(words) != 0
    assert not logging.is_progress_bar_enabled()


def test_help_by_the_module():
    command = [sys.executable, "-m", "selfpruner_hub.cli", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(verb in done.stdout for verb in ("prune", "evaluate", "demo"))


@pytest.mark.parametrize("verb", ["prune", "evaluate", "demo"])
def test_help_of_each_verb(verb, capsys):
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    assert f"usage: selfpruner {verb}" in capsys.readouterr().out


def test_help_of_prune_is_in_groups_with_the_defaults_that_matter(capsys):
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    groups = ["what is made:", "the model:", "the text of calibration and search:", "the search:", "the method:"]
    places = [told.index(group) for group in groups]
    assert places == sorted(places)
    assert "(default: 0; paper: 430; 10 with a proposer)" in told
    assert "kl or perplexity (default: kl; paper: perplexity)" in told
    assert "(default: chat+wikitext2 for a chat model, else wikitext2)" in told


def test_settings_lists_what_set_takes(run, dense, text, tmp_path):
    status, out, err = run("settings", "--json")
    listed = {setting["name"]: setting for setting in json.loads(out)}
    assert (status, err) == (0, "")
    names = {f.name for f in fields(PruneSettings)} | {f"schedule.{f.name}" for f in fields(SearchSchedule)}
    assert set(listed) == names - {"fitness", "schedule", "schedule.evaluations"}
    assert listed["window"] == {
        "name": "window", "kind": "a whole number", "default": PruneSettings().window,
        "meaning": listed["window"]["meaning"],
    }  # fmt: skip
    changes = [word for name, setting in listed.items() for word in ("--set", f"{name}={value(setting['default'])}")]
    small = prune(dense, tmp_path / "small", text)  # after those, since later words win
    assert run(*small[:5], *changes, *small[5:])[0] == 0


def value(default):
    """A default as `--set` takes it."""
    return default if isinstance(default, str) else json.dumps(default)


def test_settings_for_people(run):
    status, out, _ = run("settings", "--preset", "paper")
    assert status == 0
    assert out.startswith("Settings of the preset paper. `selfpruner prune` changes one by --set NAME=VALUE.\n")
    assert "\n\nimportance=wanda-sp\n    " in out
    assert '\n\nseeds=["uniform"]\n    ' in out
    assert "evaluations=" not in out
    assert "\n\nschedule.population=30\n    " in out
    assert max(map(len, out.splitlines())) <= 100
    assert run("settings", "--preset", "papers")[0] == 2


# -- interruption -----------------------------------------------------------------------------------------------------


def test_an_interrupted_search_goes_on_to_the_same_result(run, dense, text, tmp_path, monkeypatch):
    more = ("--evaluations", 7)  # more than the seeds and the first proposals take
    calls = []
    whole = Fitness.__call__

    def counted(self, *arguments):
        if len(calls) == allowed:
            raise KeyboardInterrupt
        calls.append(arguments)
        return whole(self, *arguments)

    monkeypatch.setattr(Fitness, "__call__", counted)
    allowed = None
    assert run(*prune(dense, tmp_path / "undisturbed", text, *more))[0] == 0
    total = len(calls)

    calls.clear()
    allowed = total - 3
    status, out, err = run(*prune(dense, tmp_path / "disturbed", text, *more))
    assert (status, out) == (130, "")
    assert "the same command again goes on" in err
    assert str(tmp_path / "disturbed.run") in err
    assert names(tmp_path) >= {"disturbed.run", "disturbed.run/search.jsonl"}
    assert "disturbed" not in names(tmp_path)

    calls.clear()
    allowed = None
    assert run(*prune(dense, tmp_path / "disturbed", text, *more))[0] == 0
    assert len(calls) == 3  # what was scored before is not scored again
    assert "disturbed.run" not in names(tmp_path)
    for name in ("selfpruner.json", "model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "disturbed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def assert_mistake(run, tmp_path):
    """Check that a command is refused: status 2, one line on stderr that says `said`, and no file more or less."""

    def check(said, *words):
        before = names(tmp_path)
        status, out, err = run(*words)
        assert (status, out) == (2, "")
        assert err.startswith("selfpruner: ")
        assert err.index("\n") == len(err) - 1
        assert said in err
        assert names(tmp_path) == before

    return check


@pytest.mark.parametrize("beta", ["0", "1", "-0.1", "abc", "nan", "30"])
def test_beta_out_of_range(beta, assert_mistake, dense, text, tmp_path):
    assert_mistake("beta must ", *prune(dense, tmp_path / "small", text, beta=beta))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "papers"], "Unknown preset 'papers'. Choose one of: default, draft, best, paper."),
        (["--proposer", "oracle"], "Unknown proposer 'oracle'. Choose self, evolution, slopes, random"),
        (["--fitness", "accuracy"], "Unknown fitness 'accuracy'. Choose from: kl, perplexity."),
        (["--evaluations", "many"], "evaluations must be a number"),
        (["--dtype", "float13"], "float13"),
        (["--set", "windows=32"], "Unknown setting windows."),
        (["--set", "window"], "NAME=VALUE"),
        (["--set", "window=wide"], "window must be a whole number"),
        (["--set", "repair=no"], "Unknown repair 'no'. Choose from: none, output, sequential, full."),
        (["--set", "repair=false"], "repair must be a name; got False. Choose from: none, output"),
        (["--set", "patience=0"], "Unknown setting patience. Known: importance, repair,"),
        (["--set", "schedule.patients=0"], "Unknown setting schedule.patients. Known: schedule.evaluations"),
        (["--set", "schedule.crossover=-1"], "schedule.crossover must be a whole number from 0 to"),
        (["--set", "schedule=5"], "schedule must be a SearchSchedule or a mapping of its fields; got 5."),
        (["--set", "schedule.evaluations=5"], "Use --evaluations 5."),
        (["--set", "window.size=5"], "window must be a whole number from 2 to"),
        (["--proposer", "self", "--proposer-option", "request_limit=9"], "Unknown proposer option request_limit."),
        (["--proposer", "random", "--proposer-option", "temperature=9"], "this proposer is none. Leave them out."),
        (["--set", "importance=magnitude"], "Unknown importance 'magnitude'."),
        (["--set", 'seeds=["best"]'], "Unknown seeds"),
        (["--set", "fitness=perplexity"], "Use --fitness perplexity."),
        (["--set", "p_max=0.1", "--beta", "0.5"], "beta=0.5 cannot be reached"),
        (["--set", "multiple_of=7"], "multiple_of=7 does not divide"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_settings(words, said, assert_mistake, dense, text, tmp_path):
    assert_mistake(said, *prune(dense, tmp_path / "small", text, *words))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ten.txt", "0123456789", "has only 10 tokens"),
        ("empty.txt", "", "has only 0 tokens"),
        ("empty.jsonl", "", "has only 0 tokens"),
        ("bad.jsonl", '{"text": "a"}\n{\n', "line 2"),
        ("text.pdf", "text", "Unknown data"),
        ("missing.txt", None, "No such file"),
        ("wikitext2", None, "Hugging Face Hub"),
    ],
)
@pytest.mark.parametrize("verb", ["prune", "evaluate"])
def test_bad_data(verb, name, content, said, assert_mistake, dense, tmp_path):
    data = name if name == "wikitext2" else tmp_path / name
    if content is not None:
        data.write_text(content)
    evaluate = ["evaluate", dense, "--data", data, "--window", "32", "--quiet"]
    assert_mistake(said, *(evaluate if verb == "evaluate" else prune(dense, tmp_path / "small", data)))


@pytest.mark.parametrize("verb", ["prune", "evaluate"])
@pytest.mark.parametrize("damage", ["nan", "cut", "no model", "nowhere"])
def test_bad_models(damage, verb, assert_mistake, dense, text, tmp_path):
    model = tmp_path / "damaged"
    if damage == "nan":
        shutil.copytree(dense, model)
        weights = load_file(model / "model.safetensors")
        weights["model.layers.2.self_attn.q_proj.weight"][0, 0] = float("nan")
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    elif damage == "cut":
        cut(dense, model)
    elif damage == "no model":
        model.mkdir()
    said = {"nan": "not finite", "cut": "cut off", "no model": "holds no model", "nowhere": "Cannot find"}[damage]
    evaluate = ["evaluate", model, "--data", text, "--window", "32", "--quiet"]
    assert_mistake(said, *(evaluate if verb == "evaluate" else prune(model, tmp_path / "small", text)))


def test_a_pruned_model_that_is_cut_off(assert_mistake, pruned, text, tmp_path):
    copy = cut(pruned, tmp_path / "copy")
    assert_mistake("cut off", "evaluate", copy, "--data", text, "--window", "32", "--quiet")


@pytest.mark.parametrize(
    ("window", "said"), [("0", "at least 2"), ("5000", "at most 128 tokens, as many as the model")]
)
def test_bad_windows_of_a_measurement(window, said, assert_mistake, dense, text):
    assert_mistake(said, "evaluate", dense, "--data", text, "--window", window, "--quiet")


@pytest.mark.parametrize("output", ["file", "file/small", "x" * 300])
def test_an_output_that_cannot_be_written(output, assert_mistake, dense, text, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_mistake("Choose another output.", *prune(dense, tmp_path / output, text))
    assert (tmp_path / "file").read_text() == "mine"


def test_the_dense_model_is_not_overwritten(assert_mistake, dense, text, tmp_path):
    model = shutil.copytree(dense, tmp_path / "model")
    assert_mistake("Choose another output.", *prune(model, model, text))
    assert (model / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()


def test_another_model_is_overwritten_only_if_asked(run, assert_mistake, dense, text, tmp_path):
    other = shutil.copytree(dense, tmp_path / "other")
    assert_mistake("--overwrite", *prune(dense, other, text))
    assert (other / "model.safetensors").read_bytes() == (dense / "model.safetensors").read_bytes()
    assert run(*prune(dense, other, text), "--overwrite")[0] == 0
    assert names(other) == FILES


def test_a_run_directory_that_cannot_be_used(assert_mistake, dense, text, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_mistake("for the run: ", *prune(dense, tmp_path / "small", text, "--run-dir", tmp_path / "file"))


@pytest.mark.parametrize(("words", "said"), [(["--seed", "1"], "seed: 0 there, 1 here"), (["--beta", "0.2"], "beta: ")])
def test_the_run_directory_of_another_search(words, said, run, assert_mistake, dense, text, tmp_path):
    run_dir = ("--run-dir", tmp_path / "run")
    assert run(*prune(dense, tmp_path / "first", text, *run_dir))[0] == 0
    journal = (tmp_path / "run" / "search.jsonl").read_bytes()
    assert_mistake(said, *prune(dense, tmp_path / "second", text, *run_dir, *words))
    assert (tmp_path / "run" / "search.jsonl").read_bytes() == journal


def test_a_mistake_as_json(run, dense, text, tmp_path):
    status, out, err = run(*prune(dense, tmp_path / "small", text, "--json", beta=1))
    told = json.loads(out)
    assert status == 2
    assert err == f"selfpruner: {told['error']} {told['hint']}\n"


def test_a_read_only_output_directory(assert_mistake, dense, text, tmp_path, monkeypatch):
    """Whoever runs the tests may be root, whom no permission stops: the file system itself says no."""
    (tmp_path / "out").mkdir()
    create = tempfile.TemporaryFile

    def refuse(*args, dir=None, **kwargs):
        if str(dir) == str(tmp_path / "out"):
            raise OSError(errno.EROFS, "Read-only file system")
        return create(*args, dir=dir, **kwargs)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert_mistake("Read-only file system", *prune(dense, tmp_path / "out", text))
    assert names(tmp_path) == {"out"}


def test_a_recovery_that_would_replace_another_model_is_refused_at_once(pruned, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path / "other")
    words = ["recover", str(pruned), "--against", "missing", "--minutes", "1", "--output", str(tmp_path / "other")]
    assert main(words) == 2
    assert "holds another model" in capsys.readouterr().err


def test_the_demo_has_no_json(capsys):
    assert main(["demo", "--json"]) == 2
    assert "The demo has no JSON." in capsys.readouterr().err
