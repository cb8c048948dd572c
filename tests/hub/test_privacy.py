"""What tells a secret or a place on this machine is not published: planted ones are found, wherever they stand."""

from pathlib import Path

import pytest

from selfpruner_hub.errors import UserError
from selfpruner_hub.hub.privacy import check_private


def refused(files, directory, tokens=()):
    with pytest.raises(UserError) as caught:
        check_private(files, directory, tokens)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "Authorization: Bearer hf_" + "aB3" * 12,
        '{"key": "sk-' + "a1-_" * 8 + '"}',
        "http://someone:planted@10.0.0.7/v1",
        "-----BEGIN RSA PRIVATE KEY-----",
    ],
)
def test_what_looks_like_a_secret(text, tmp_path):
    said = refused({"search.jsonl": text.encode()}, tmp_path)
    assert said.startswith("search.jsonl holds what looks like a token or a key")
    assert text not in said


@pytest.mark.parametrize("name", ["SELFPRUNER_API_KEY", "HF_TOKEN", "AWS_SECRET", "DB_PASSWORD"])
@pytest.mark.parametrize("file", ["README.md", "model.safetensors", "onnx/model.onnx", "tokenizer.json"])
def test_a_secret_of_the_environment(name, file, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "planted-secret")
    path = tmp_path / "file"
    path.write_bytes(b"\0" * 5000 + b"planted-secret" + b"\0" * 5000)
    said = refused({"fine": b"", file: path}, tmp_path)
    assert said.startswith(f"{file} holds ")
    assert "planted-secret" not in said


def test_a_token_that_was_passed(tmp_path):
    assert "your Hub token" in refused({"a.json": b"planted-token"}, tmp_path, ["planted-token", None])


def test_paths_of_this_machine(tmp_path, monkeypatch):
    home, here = tmp_path / "home" / "planted", tmp_path / "here" / "planted"
    monkeypatch.setenv("HOME", str(home))
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for place in (home, here, tmp_path / "model", tmp_path):
        assert "a path of this machine" in refused({"a.json": f'"{place}"'.encode()}, tmp_path / "model")


def test_a_folder_right_under_the_root_is_found_only_as_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/planted")
    check_private({"a.json": b"a /planted tree"}, Path("/elsewhere/model"))
    refused({"a.json": b"/planted/model"}, Path("/elsewhere/model"))


def test_words_of_a_vocabulary_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/app")
    check_private({"tokenizer.json": b'{"/app/": 7}'}, tmp_path)


def test_short_values_are_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc")
    check_private({"a.json": b"abc", "empty.txt": b""}, tmp_path)
