"""Publishing, by the real client against a Hub on the loopback: end to end, and again."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from support.hub_client import environment
from support.processes import run_python
from support.tiny import tiny_model, tiny_tokenizer

from exporters.format import FORMATS, ExportFormat
from selfpruner_hub import AutoPruner, __version__
from selfpruner_hub.hub.space import GGUF, GRAPHS, RUNTIMES
from selfpruner_hub.storage.layout import EXPORTS, asset
from selfpruner_hub.storage.model_record import read_record

pytestmark = pytest.mark.heavy
READ = "hf_read_token_of_me"
PICTURES = {f"plots/{name}" for name in ("population.png", "rates.png", "search.png")}


def test_one_commit_holds_all_of_it(push, hub, saved_model, repo_name):
    done = push(saved_model, repo_name)
    assert (done.status, done.out, done.err) == (0, f"{hub.url}/{repo_name}\n", "")
    files = hub.files(repo_name)
    assert set(files) == {".gitattributes", *PICTURES, *(path.name for path in saved_model.iterdir())}
    assert len(hub.repo(repo_name).history) == 2  # the Hub's own, and one of ours
    for path in saved_model.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes(), path.name
    card = files["README.md"].decode()
    assert f'from_pretrained("{repo_name}", trust_remote_code=True)' in card
    assert "license: mit" in card
    assert set(re.findall(r"\]\((plots/[^)]+)\)", card)) <= set(files)


def test_a_second_push_sends_nothing(push, hub, saved_model, repo_name):
    assert push(saved_model, repo_name, "--space").status == 0
    repos = hub.repo(repo_name), hub.repo(f"{repo_name}-demo", "space")
    before = [list(repo.history) for repo in repos]
    hub.reset()
    done = push(saved_model, repo_name, "--space")
    assert done.out == f"{hub.url}/{repo_name} (it was up to date)\n{hub.url}/spaces/{repo_name}-demo\n"
    assert hub.received == 0
    assert not [request for request in hub.requests if "/commit/" in request or request.startswith("PUT")]
    assert before == [repo.history for repo in repos]


def test_only_what_changed_is_sent(push, hub, saved_model, repo_name):
    push(saved_model, repo_name)
    hub.reset()
    record = json.loads((saved_model / "selfpruner.json").read_text())
    record["metrics"]["perplexity"] = {"value": 12.5, "dense": 10.25, "protocol": "text.txt, 4 windows"}
    (saved_model / "selfpruner.json").write_text(json.dumps(record))
    assert push(saved_model, repo_name).status == 0
    assert hub.received == 0
    assert "| perplexity | 10.25 | 12.5 |" in hub.files(repo_name)["README.md"].decode()


def test_a_new_model_replaces_the_old_one_whole(push, hub, saved_models, saved_model, repo_name):
    (saved_model / "model-00001-of-00002.safetensors").write_bytes((saved_model / "model.safetensors").read_bytes())
    push(saved_model, repo_name)
    old = hub.files(repo_name)
    shutil.copytree(saved_models / "second", saved_model, dirs_exist_ok=True)
    (saved_model / "model-00001-of-00002.safetensors").unlink()
    (saved_model / "notes.txt").write_text("mine")  # stays at home
    assert push(saved_model, repo_name).status == 0
    new = hub.files(repo_name)
    assert new["model.safetensors"] == (saved_models / "second" / "model.safetensors").read_bytes()
    assert new["plots/rates.png"] != old["plots/rates.png"]
    assert set(old) - set(new) == {"model-00001-of-00002.safetensors"}
    assert set(new) <= set(old)


def test_a_stock_model_replaces_one_with_code(push, hub, saved_model, repo_name, tmp_path):
    push(saved_model, repo_name)
    assert "modeling_selfpruned.py" in hub.files(repo_name)
    settings = {"window": 32, "calibration_tokens": 1024, "fitness_tokens": 256, "fisher_tokens": 256}
    pruner = AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama")
    pruned = pruner.prune(0.2, uniform=True, data="self", multiple_of=1, progress=False, **settings)
    pruned.save_pretrained(tmp_path / "stock")
    done = push(tmp_path / "stock", repo_name, "--space")
    assert (done.status, done.err) == (0, "")
    files = hub.files(repo_name)
    assert files["model.safetensors"] == (tmp_path / "stock" / "model.safetensors").read_bytes()
    assert not [name for name in files if name.endswith(".py")]
    assert "trust_remote_code" not in files["README.md"].decode()


def test_what_others_put_there_is_left_alone(push, hub, saved_model, repo_name):
    push(saved_model, repo_name)
    repo = hub.repo(repo_name)
    theirs = {"demo.mp4": hub.put(b"a film", True), "LICENSE": hub.put(b"MIT", False)}
    repo.commit("main", {**repo.commits[repo.refs["main"]], **theirs}, "By hand")
    (saved_model / "config.json").write_text((saved_model / "config.json").read_text() + "\n")
    assert push(saved_model, repo_name).status == 0
    assert {"demo.mp4", "LICENSE"} <= set(hub.files(repo_name))


@pytest.mark.parametrize("same_weights", [True, False])
def test_exports_that_are_only_there_stay_with_their_weights(
    same_weights, push, hub, saved_models, saved_model, repo_name
):
    push(saved_model, repo_name)
    repo = hub.repo(repo_name)
    tree = repo.commits[repo.refs["main"]]
    repo.commit("main", {**tree, "onnx/model.onnx": hub.put(b"graph", True)}, "By hand")
    assert push(saved_model if same_weights else saved_models / "second", repo_name).status == 0
    files = hub.files(repo_name)
    assert ("onnx/model.onnx" in files) == same_weights == ("OnnxCausalLM" in files["README.md"].decode())


def test_a_branch(push, hub, saved_model, repo_name):
    assert push(saved_model, repo_name, "--revision", "trial").status == 0
    assert set(hub.files(repo_name)) == {".gitattributes"}
    files = hub.files(repo_name, revision="trial")
    assert {"model.safetensors", "README.md"} <= set(files)
    assert f'"{repo_name}", revision="trial"' in files["README.md"].decode()
    assert push(saved_model, repo_name, "--revision", "trial").out.endswith("(it was up to date)\n")
    assert len(hub.repo(repo_name).history) == 2


def test_a_pull_request(push, hub, saved_model, repo_name):
    push(saved_model, repo_name)
    before = hub.files(repo_name)
    (saved_model / "config.json").write_text((saved_model / "config.json").read_text() + "\n")
    done = push(saved_model, repo_name, "--create-pr", "--json", token=READ)  # the right to read is enough
    assert done.status == 0, done.err
    assert json.loads(done.out)["url"] == f"{hub.url}/{repo_name}/discussions/1"
    assert hub.files(repo_name, revision="refs/pr/1")["config.json"] == (saved_model / "config.json").read_bytes()
    assert hub.files(repo_name) == before


@pytest.mark.parametrize("later", [False, True])
def test_a_private_repository(later, push, hub, saved_model, repo_name):
    """Also where the Space comes later, without the word: it has the model's files."""
    assert push(saved_model, repo_name, "--private", *([] if later else ["--space"])).status == 0
    if later:
        assert push(saved_model, repo_name, "--space").status == 0
    assert hub.repo(repo_name).private
    assert hub.repo(f"{repo_name}-demo", "space").private


def test_a_public_repository_is_not_taken_for_a_private_one(push, hub, saved_model, repo_name):
    assert push(saved_model, repo_name).status == 0
    before = hub.files(repo_name)
    (saved_model / "config.json").write_text((saved_model / "config.json").read_text() + "\n")
    done = push(saved_model, repo_name, "--private")
    assert done.status == 2
    assert f"{repo_name} is there already, and public. Make it private" in done.err
    assert hub.files(repo_name) == before


def test_a_space_needs_a_parent_on_the_hub(push, hub, saved_model, repo_name):
    path = saved_model / "selfpruner.json"
    path.write_text(path.read_text().replace('"tests/llama"', '"folder"'))
    done = push(saved_model, repo_name, "--space")
    assert done.status == 2
    assert "'folder' names no repository there. Prune with base_model (--base-model)" in done.err
    assert push(saved_model, repo_name).status == 0


def test_a_space_with_its_files(push, hub, saved_model, repo_name, tmp_path):
    done = push(saved_model, repo_name, "--space", "--revision", "trial")
    assert done.out == f"{hub.url}/{repo_name}\n{hub.url}/spaces/{repo_name}-demo\n"
    files = hub.files(f"{repo_name}-demo", "space")
    assert {"app.py", "requirements.txt", "README.md", "model.json", "selfpruner_hub/pruner.py"} <= set(files)
    told = json.loads(files["model.json"])
    assert told.pop("commit") == hub.repo(repo_name).refs["trial"]
    assert told == {"pruned": repo_name, "revision": "trial", "dense": "tests/llama"}
    assert hub.repo(f"{repo_name}-demo", "space").sdk == "gradio"
    assert f"- {repo_name}\n- tests/llama\n" in files["README.md"].decode()

    for path, content in files.items():  # the package that it carries is whole
        (tmp_path / "space" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "space" / path).write_bytes(content)
    code = "import sys; sys.path.insert(0, 'space'); import selfpruner_hub.pruner as it; print(it.__file__)"
    done = run_python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("space") or str(tmp_path / "space") in done.stdout
    (found,) = distributions(name="selfpruner-hub", path=[str(tmp_path / "space")])  # records of runs have the version
    assert found.version == __version__


def test_a_space_restarts_where_its_model_has_changed(push, hub, saved_models, repo_name):
    """It keeps the model in memory; nothing else of its files changes."""
    told = []
    for name in ("first", "first", "second"):
        push(saved_models / name, repo_name, "--space")
        told.append(hub.files(f"{repo_name}-demo", "space")["model.json"])
    assert told[0] == told[1] != told[2]


def test_a_space_runs_the_gguf_file_of_its_model(push, hub, saved_models, saved_model, repo_name):
    """As long as the repository has one of these weights, pushed now or before."""

    def shown():
        files = hub.files(f"{repo_name}-demo", "space")
        return json.loads(files["model.json"]).get("gguf"), files["requirements.txt"].decode()

    plain = (asset("spaces") / "requirements.txt").read_text()
    push(saved_model, repo_name, "--space")
    assert shown() == (None, plain)
    repo = hub.repo(repo_name)
    names = ("gguf/model-q8_0.gguf", "gguf/model-f16.gguf", "gguf/Modelfile")
    by_hand = {name: hub.put(name.encode(), True) for name in names}
    repo.commit("main", {**repo.commits[repo.refs["main"]], **by_hand}, "By hand")
    push(saved_model, repo_name, "--space")
    assert shown() == ("gguf/model-f16.gguf", f"{plain}{RUNTIMES[GGUF][0]}\n")
    push(saved_models / "second", repo_name, "--space")
    assert shown() == (None, plain)


@pytest.mark.parametrize(("kind", "extra"), [(GGUF, "gguf"), (GRAPHS, "onnx")])
def test_a_space_requires_the_runtime_of_the_package(kind, extra):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"][extra] == list(RUNTIMES[kind])


def test_reloaded_by_its_name_in_a_fresh_process(push, hub, saved_models, repo_name, tmp_path):
    """Without the package, then with it, from the main branch and from another; greedy text is that of the files."""
    push(saved_models / "first", repo_name)
    push(saved_models / "second", repo_name, "--revision", "trial")
    code = f"""
import sys, json, torch
out = []
sys.modules["selfpruner_hub"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
for where in ({{}}, {{"revision": "trial"}}):
    model = AutoModelForCausalLM.from_pretrained({repo_name!r}, trust_remote_code=True, **where)
    tokenizer = AutoTokenizer.from_pretrained({repo_name!r}, **where)
    inputs = tokenizer("abc", return_tensors="pt")
    out.append([sum(p.numel() for p in model.parameters()), model.generate(**inputs, max_new_tokens=4)[0].tolist()])
del sys.modules["selfpruner_hub"]
from selfpruner_hub import PrunedModel
for where in ({{}}, {{"revision": "trial"}}):
    pruned = PrunedModel.from_pretrained({repo_name!r}, **where)
    inputs = pruned.tokenizer("abc", return_tensors="pt")
    count = pruned.report.parameters["pruned"]
    out.append([count, pruned.model.generate(**inputs, max_new_tokens=4)[0].tolist()])
print(json.dumps(out))
"""
    env = environment(hub.url, tmp_path)
    done = run_python(code, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found[:2] == found[2:]
    assert [count for count, _ in found[:2]] == [
        read_record(saved_models / name).parameters["pruned"] for name in ("first", "second")
    ]
    assert not [path for path in (tmp_path / "hf").rglob("*.png") if path.is_file()]  # pictures are not needed for that


def test_from_memory(hub, hub_client, saved_models, repo_name):
    code = f"""
from selfpruner_hub import PrunedModel
pruned = PrunedModel.from_pretrained({str(saved_models / "first")!r})
done = pruned.push_to_hub({repo_name!r}, private=True, space=True)
assert done.url.endswith({repo_name!r}) and done.space.endswith("-demo") and done.changed
assert not pruned.push_to_hub({repo_name!r}).changed
"""
    done = hub_client(code=code, HF_TOKEN="hf_write_token_of_me")
    assert done.status == 0, done.err
    assert hub.files(repo_name)["selfpruner.json"] == (saved_models / "first" / "selfpruner.json").read_bytes()


def test_a_space_shows_no_pull_request(push, saved_model, repo_name):
    done = push(saved_model, repo_name, "--space", "--create-pr")
    assert (done.status, done.out) == (2, "")
    assert "after the merge" in done.err


def test_the_folders_of_exports_are_the_formats():
    assert set(EXPORTS) == {name for name, each in FORMATS.items() if isinstance(each, ExportFormat)}
