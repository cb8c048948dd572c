"""Graphs for ONNX Runtime GenAI and Transformers.js, in a repository beside the model."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import yaml
from support.hub_server import check_yaml

from selfpruner_hub.errors import ExportError, SavedModelError, UserError
from selfpruner_hub.hub.bundle import collect
from selfpruner_hub.hub.exports import make_exports
from selfpruner_hub.hub.publish import publish
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.models.weights import identity_of
from selfpruner_hub.storage.export_record import EXPORT_RECORD_FILE, ExportRecord, read_export

pytestmark = pytest.mark.heavy
GRAPHS = {f"onnx/model{suffix}.onnx{data}" for suffix in ("", "_fp16", "_quantized", "_q4") for data in ("", "_data")}


@pytest.fixture(scope="module")
def exported(hub, hub_client, saved_graphs, tmp_path_factory):
    """A model that was pushed with its graphs, and what was printed."""
    model, alone = tmp_path_factory.mktemp("graphs") / "model", shutil.ignore_patterns("dense")
    shutil.copytree(saved_graphs / "model", model, ignore=alone)
    done = hub_client("push", model, "me/graphs", "--with", "onnx", "--quiet", HF_TOKEN="hf_write_token_of_me")
    assert done.status == 0, done.err
    return model, done.out


@pytest.fixture
def model(exported, tmp_path):
    """That model, for a test of its own."""
    return shutil.copytree(exported[0], tmp_path / "exported")


def test_graphs_have_a_repository_of_their_own(exported, hub):
    model, out = exported
    assert out == f"{hub.url}/me/graphs\n{hub.url}/me/graphs-ONNX\n"
    files = hub.files("me/graphs-ONNX")
    assert {name for name in files if "/" in name} == GRAPHS
    assert json.loads(files["config.json"])["model_type"] == "llama"
    assert {"genai_config.json", "tokenizer.json", "selfpruner.json", EXPORT_RECORD_FILE} <= set(files)
    for name in GRAPHS:
        assert files[name] == (model / "onnx" / name).read_bytes()
    assert not [name for name in hub.files("me/graphs") if name.startswith("onnx/")]
    card = hub.files("me/graphs")["README.md"].decode()
    assert "[me/graphs-ONNX](https://huggingface.co/me/graphs-ONNX)" in card
    assert "OnnxCausalLM" not in card


def test_the_card_of_the_graphs(exported, hub):
    model, _ = exported
    card = hub.files("me/graphs-ONNX")["README.md"].decode()
    assert check_yaml(card) == []
    told = yaml.safe_load(card.split("---\n")[1])
    assert told["base_model"] == "me/graphs"
    assert told["base_model_relation"] == "quantized"
    assert (told["library_name"], told["license"]) == ("transformers.js", "mit")
    assert "[me/graphs](https://huggingface.co/me/graphs)" in card
    assert 'og.Model(snapshot_download("me/graphs-ONNX"' in card
    assert "pipeline('text-generation', 'me/graphs-ONNX', { dtype: 'q8' })" in card
    for name, size in re.findall(r"\| `(onnx/\S+)` \| .+ \| ([\d.]+) MB \|", card):
        assert float(size) == round((model / "onnx" / f"{name}_data").stat().st_size / 1e6, 1)
    assert len(re.findall(r"\| `onnx/", card)) == 4


def test_a_second_push_makes_and_sends_nothing(exported, hub, push):
    before = hub.files("me/graphs-ONNX")
    out = push(exported[0], "me/graphs", "--with", "onnx").out
    assert out == f"{hub.url}/me/graphs (it was up to date)\n{hub.url}/me/graphs-ONNX\n"
    assert hub.received == 0
    assert hub.files("me/graphs-ONNX") == before


def test_a_space_runs_the_graphs(model, hub, push, repo_name, saved_models):
    """Those that are pushed, or that are there of these weights; where there is a GGUF file, that one."""

    def shown():
        files = hub.files(f"{repo_name}-demo", "space")
        settings = json.loads(files["model.json"])
        return settings.get("gguf"), settings.get("graphs"), "onnxruntime" in files["requirements.txt"].decode()

    push(model, repo_name, "--space")
    assert shown() == (None, f"{repo_name}-ONNX", True)
    shutil.rmtree(model / "onnx")
    push(model, repo_name, "--space")
    assert shown() == (None, f"{repo_name}-ONNX", True)
    repo = hub.repo(repo_name)
    by_hand = {"gguf/model-f16.gguf": hub.put(b"a file", True)}
    repo.commit("main", {**repo.commits[repo.refs["main"]], **by_hand}, "By hand")
    push(model, repo_name, "--space")
    assert shown() == ("gguf/model-f16.gguf", None, False)
    push(saved_models / "second", repo_name, "--space")
    assert shown() == (None, None, False)


def test_files_of_an_earlier_model_go(model, hub, push, repo_name):
    push(model, repo_name)
    repo = hub.repo(f"{repo_name}-ONNX")
    old = {name: hub.put(b"old", False) for name in ("onnx/model_bnb4.onnx", "chat_template.jinja", "film.mp4")}
    repo.commit("main", {**repo.commits[repo.refs["main"]], **old}, "By hand")
    push(model, repo_name)
    assert set(old) & set(hub.files(f"{repo_name}-ONNX")) == {"film.mp4"}


def test_a_branch(model, hub, push, repo_name):
    push(model, repo_name, "--revision", "trial")
    card = hub.files(f"{repo_name}-ONNX", revision="trial")["README.md"].decode()
    assert f'snapshot_download("{repo_name}-ONNX", revision="trial"' in card
    assert f"'{repo_name}-ONNX', {{ dtype: 'q8', revision: 'trial' }})" in card


def test_the_model_is_there_where_its_graphs_fail(model, hub, push, repo_name):
    hub.plan(rf"POST /api/models/{repo_name}-ONNX/commit", status=500, times=9)
    done = push(model, repo_name)
    assert done.status == 1
    assert "The model is published, its ONNX graphs are not: " in done.err
    assert "model.safetensors" in hub.files(repo_name)


def test_no_pull_request(model, hub, push, repo_name):
    done = push(model, repo_name, "--with", "onnx", "--create-pr")
    assert (done.status, done.out) == (2, "")
    assert "ONNX graphs have a repository of their own, not a pull request. Push them after the merge." in done.err
    assert not hub.requests


def test_a_commit_to_a_pull_request_that_is_there(model, hub, push, repo_name):
    """The graphs have no such reference in their repository."""
    done = push(model, repo_name, "--with", "onnx", "--revision", "refs/pr/1")
    assert (done.status, done.out) == (2, "")
    assert "ONNX graphs have a repository of their own, not a pull request." in done.err
    assert not hub.requests


def test_a_pull_request_of_a_model_that_has_graphs(model, hub, push, repo_name):
    push(model, repo_name)
    hub.reset()
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert push(model, repo_name, "--create-pr").out == f"{hub.url}/{repo_name}/discussions/1\n"
    assert not [request for request in hub.requests if "-ONNX" in request and "commit" in request]


def test_another_layout_stays_beside_the_model(model, push, hub, repo_name):
    """A graph for `OnnxCausalLM` is published with the model; `--with onnx` makes the other one in its place."""
    record = read_export(model / "onnx")
    path = model / "onnx" / EXPORT_RECORD_FILE
    text = path.read_text()
    path.write_text(text.replace('"layout": "hub"', '"layout": "transformers"'))
    bundle = collect(model)
    assert (bundle.exports, bundle.graphs) == (("onnx",), {})
    assert "onnx/config.json" in bundle.files
    path.write_text(text)
    bundle = collect(model)
    assert (bundle.exports, set(bundle.graphs) >= GRAPHS) == ((), True)
    assert record.has_hub_layout


def test_an_export_in_another_layout_is_made_anew(model, monkeypatch):
    made = []

    def export(name, to, output, **options):
        assert (model / "onnx" / EXPORT_RECORD_FILE).exists()  # until the new one is whole
        made.append((name, to, options))
        output.mkdir()
        return output

    monkeypatch.setattr("exporters.export.export", export)
    make_exports(model, ["onnx"])
    assert made == []  # it is there
    path = model / "onnx" / EXPORT_RECORD_FILE
    path.write_text(path.read_text().replace('"layout": "hub"', '"layout": "transformers"'))
    make_exports(model, ["onnx"])
    assert made == [(model, "onnx", {"layout": "hub"})]
    assert list((model / "onnx").iterdir()) == []


def test_an_export_that_cannot_be_made_anew_is_not_lost(handmade, monkeypatch):
    def export(*_words, **_options):
        raise ExportError("No room.", "Make some.")

    path = handmade / "onnx" / EXPORT_RECORD_FILE
    path.write_text(path.read_text().replace('"layout": "hub"', '"layout": "transformers"'))
    before = sorted(handmade.rglob("*"))
    monkeypatch.setattr("exporters.export.export", export)
    with pytest.raises(ExportError):
        make_exports(handmade, ["onnx"])
    assert sorted(handmade.rglob("*")) == before


@pytest.mark.parametrize("name", ["onnx/model.onnx", "onnx/model_q4.onnx_data"])
def test_graphs_that_are_not_whole(name, handmade):
    (handmade / "onnx" / name).unlink()
    with pytest.raises(SavedModelError, match=rf"/onnx' lacks {name}\. Push with --with onnx"):
        collect(handmade)


# -- another model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def handmade(saved_model):
    """A saved model with graphs that take no time to make: publishing does not run them."""
    folder = saved_model / "onnx"
    (folder / "onnx").mkdir(parents=True)
    source = {"name": "", **identity_of(load_model(str(saved_model), device="cpu")[0])}
    (folder / EXPORT_RECORD_FILE).write_text(
        ExportRecord("onnx", {"layout": "hub"}, source, {}, 0.1, 0.0, "", "").to_json()
    )
    shutil.copy(saved_model / "selfpruner.json", folder)
    for name in GRAPHS:
        (folder / name).write_bytes(name.encode())
    return saved_model


def test_graphs_of_an_earlier_model_are_named_and_not_linked(handmade, saved_models, hub, push, repo_name):
    """Nobody asked to delete another repository, and the card must not lead to graphs of other weights."""
    push(handmade, repo_name)
    before = hub.files(f"{repo_name}-ONNX")
    hub.reset()
    done = push(saved_models / "second", repo_name)
    assert (done.status, done.out) == (0, f"{hub.url}/{repo_name}\n")
    assert done.err == (
        f"selfpruner: {repo_name}-ONNX holds ONNX graphs of an earlier model. Renew them by pushing with --with onnx.\n"
    )
    assert f"{repo_name}-ONNX" not in hub.files(repo_name)["README.md"].decode()
    assert hub.files(f"{repo_name}-ONNX") == before
    again = push(saved_models / "second", repo_name, "--json")
    assert json.loads(again.out)["stale_graphs"] == f"{repo_name}-ONNX"
    assert again.err == done.err


def test_graphs_of_this_model_stay_linked(handmade, hub, push, repo_name):
    """After they were deleted here, and after a measurement, which changes the record but no weights."""
    push(handmade, repo_name)
    shutil.rmtree(handmade / "onnx")
    record = json.loads((handmade / "selfpruner.json").read_text())
    record["metrics"]["perplexity"] = {"value": 12.5, "dense": 10.25, "protocol": "text.txt, 4 windows"}
    (handmade / "selfpruner.json").write_text(json.dumps(record))
    done = push(handmade, repo_name)
    assert (done.out, done.err) == (f"{hub.url}/{repo_name}\n", "")
    card = hub.files(repo_name)["README.md"].decode()
    assert f"[{repo_name}-ONNX](https://huggingface.co/{repo_name}-ONNX)" in card
    assert "| perplexity | 10.25 | 12.5 |" in card


def test_graphs_of_another_branch_are_not_those_of_this_one(handmade, saved_models, hub, push, repo_name):
    push(handmade, repo_name)
    done = push(saved_models / "second", repo_name, "--revision", "trial")
    assert (done.status, done.err) == (0, "")
    assert f"{repo_name}-ONNX" not in hub.files(repo_name, revision="trial")["README.md"].decode()


@pytest.mark.parametrize(("record", "ours"), [(None, False), (b"{", True)], ids=["none", "damaged"])
def test_graphs_without_a_record(record, ours, handmade, saved_models, hub, push, repo_name):
    """A repository of that name that is not ours is not spoken of; one with a damaged record is of another model."""
    push(handmade, repo_name)
    repo = hub.repo(f"{repo_name}-ONNX")
    tree = {name: oid for name, oid in repo.commits[repo.refs["main"]].items() if name != "selfpruner.json"}
    repo.commit("main", tree if record is None else {**tree, "selfpruner.json": hub.put(record, False)}, "By hand")
    done = push(saved_models / "second", repo_name)
    assert done.status == 0
    assert bool(done.err) == ours
    assert f"{repo_name}-ONNX" not in hub.files(repo_name)["README.md"].decode()


def test_the_hub_fails_when_it_is_asked_for_graphs(saved_models, hub, push, repo_name):
    hub.plan(rf"GET /api/models/{repo_name}-ONNX", status=503)
    assert push(saved_models / "second", repo_name).status == 0
    hub.plan(rf"GET /api/models/{repo_name}-ONNX", status=503, times=99)
    done = push(saved_models / "second", repo_name)
    assert (done.status, done.err.count("\n")) == (1, 1)


# -- a static Space ---------------------------------------------------------------------------------------------------


def test_a_static_space(model, hub, push, repo_name):
    """The page, the names that it reads, and the graphs of both models."""
    (model / "onnx" / "dense").mkdir()
    (model / "onnx" / "dense" / "model_quantized.onnx").write_bytes(b"graph of the parent")
    out = push(model, repo_name, "--space", "static").out
    assert out == f"{hub.url}/{repo_name}\n{hub.url}/{repo_name}-ONNX\n{hub.url}/spaces/{repo_name}-browser\n"
    files = hub.files(f"{repo_name}-browser", "space")
    assert set(files) == {".gitattributes", "README.md", "index.html", "page.js", "worker.js", "model.json"}
    assert hub.repo(f"{repo_name}-browser", "space").sdk == "static"
    card = files["README.md"].decode()
    assert check_yaml(card) == []
    told = yaml.safe_load(card.split("---\n")[1])
    assert (told["sdk"], told["models"]) == ("static", [f"{repo_name}-ONNX", "tests/llama"])
    settings = json.loads(files["model.json"])
    assert (settings["graphs"], settings["host"], settings["revision"]) == (f"{repo_name}-ONNX", f"{hub.url}/", None)
    assert settings["parameters"]["dense"] > settings["parameters"]["pruned"]
    graphs = hub.files(f"{repo_name}-ONNX")
    assert graphs["dense/model_quantized.onnx"] == b"graph of the parent"
    assert 'ignore_patterns=["onnx/model_*", "dense/*"]' in graphs["README.md"].decode()
    assert push(model, repo_name, "--space", "static").out == out.replace("\n", " (it was up to date)\n", 1)


def test_graphs_of_a_parent_stay_with_the_model_and_go_with_it(handmade, saved_models, hub, push, repo_name, tmp_path):
    dense = handmade / "onnx" / "dense"
    dense.mkdir()
    (dense / "model_quantized.onnx").write_bytes(b"graph of the parent")
    push(handmade, repo_name)
    shutil.rmtree(dense)
    push(handmade, repo_name, "--commit-message", "again")
    graphs = hub.files(f"{repo_name}-ONNX")
    assert "dense/model_quantized.onnx" in graphs
    assert '"dense/*"' in graphs["README.md"].decode()
    other = shutil.copytree(saved_models / "second", tmp_path / "other")
    shutil.copytree(handmade / "onnx", other / "onnx")
    shutil.copy(other / "selfpruner.json", other / "onnx")
    source = {"name": "", **identity_of(load_model(str(other), device="cpu")[0])}
    record = ExportRecord("onnx", {"layout": "hub"}, source, {}, 0.1, 0.0, "", "")
    (other / "onnx" / EXPORT_RECORD_FILE).write_text(record.to_json())
    push(other, repo_name)
    graphs = hub.files(f"{repo_name}-ONNX")
    assert "dense/model_quantized.onnx" not in graphs
    assert '"dense/*"' not in graphs["README.md"].decode()


def test_graphs_of_another_parent(model, monkeypatch):
    """Another model than the one that was pruned is no parent; nothing of it is left."""
    monkeypatch.setattr("exporters.export.export", lambda *words, **options: model / "onnx")
    with pytest.raises(UserError, match="'other' is not 'tests/llama', the parent of this model: other parameters"):
        make_exports(model, [], static=True, parent="other")
    assert not (model / "onnx" / "dense").exists()


def test_graphs_of_the_parent_are_of_the_commit_that_was_pruned(model, monkeypatch):
    record, loading = json.loads((model / "selfpruner.json").read_text()), []
    for folder in (model, model / "onnx"):
        (folder / "selfpruner.json").write_text(json.dumps({**record, "base_revision": 40 * "a"}))

    def export(*_words, **options):
        loading.append(options["loading"])
        raise UserError("That is all.")

    monkeypatch.setattr("exporters.export.export", export)
    for copy in (None, "copy"):
        with pytest.raises(UserError, match="That is all"):
            make_exports(model, [], static=True, parent=copy)
    assert loading == [{"revision": 40 * "a"}, {}]


def test_a_static_space_of_a_private_model_is_refused(model, push, repo_name):
    (model / "onnx" / "dense").mkdir()
    (model / "onnx" / "dense" / "model_quantized.onnx").write_bytes(b"graph of the parent")
    done = push(model, repo_name, "--private", "--space", "static")
    assert done.status == 2
    assert "A static Space cannot read the graphs of a private model" in done.err


def test_a_static_space_of_private_graphs_is_refused(model, hub, push, repo_name):
    """As where the model was made public on the Hub after both had been private."""
    (model / "onnx" / "dense").mkdir()
    (model / "onnx" / "dense" / "model_quantized.onnx").write_bytes(b"graph of the parent")
    push(model, repo_name)
    hub.repo(f"{repo_name}-ONNX").private = True
    done = push(model, repo_name, "--space", "static")
    assert (done.status, done.out) == (2, "")
    assert f"{repo_name}-ONNX is private, and a static Space loads its graphs in the visitor's browser." in done.err


def test_a_static_space_needs_graphs(saved_model, model):
    for directory in (saved_model, model):
        with pytest.raises(UserError, match="ONNX graphs of the model and of its dense parent, which are not there"):
            publish(directory, "me/nothing", space="static")


def test_another_kind_of_space(model, hub, push, repo_name):
    done = push(model, repo_name, "--space", "docker")
    assert (done.status, done.err.count("\n")) == (2, 1)
    assert "Unknown kind of Space 'docker'. Choose gradio or static." in done.err
    assert not hub.requests
