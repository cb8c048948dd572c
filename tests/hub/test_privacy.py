"""What tells a secret or a place on this machine is not published: planted ones are found, wherever they stand."""

import json
from pathlib import Path
from urllib.parse import quote

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


@pytest.mark.parametrize(
    "token", ["hf_" + "x4" * 17, "sk-" + "x4" * 10], ids=["34 characters, as the Hub's have", "20 characters"]
)
@pytest.mark.parametrize(
    "file",
    [
        *("README.md", "config.json", "modeling_selfpruned.py", "search.jsonl", "chat_template.jinja", "LICENSE"),
        *("merges.txt", "onnx/selfpruner_export.json", "openvino/model.xml", "requirements.txt", "space.yaml"),
    ],
)
def test_what_looks_like_a_token_in_any_text(file, token, tmp_path):
    assert refused({file: f"a {token} b".encode()}, tmp_path).startswith(f"{file} holds what looks like a token")


def test_chance_in_weights_is_no_token(tmp_path):
    check_private({"model.safetensors": b"hf_" + b"x4" * 17}, tmp_path)


@pytest.mark.parametrize("secret", ["12345678", "twelve-chars"])
def test_a_short_secret(secret, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", secret)
    assert "the value of MY_SECRET" in refused({"a.json": f'"{secret}"'.encode()}, tmp_path)


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


def test_the_token_of_a_login(tmp_path, monkeypatch):
    """Stored by the Hub's client, in no variable and passed by nobody."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    stored = tmp_path / "token"
    stored.write_text("planted-login\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(stored))
    assert "your Hub token" in refused({"a.json": b"planted-login"}, tmp_path)


@pytest.mark.parametrize(
    "written",
    [lambda text: json.dumps(text), lambda text: json.dumps(text, ensure_ascii=False), lambda text: quote(text, "")],
    ids=["json", "json of other letters", "address"],
)
@pytest.mark.parametrize("file", ["selfpruner.json", "search.jsonl", "README.md"])
def test_what_is_written_in_another_form(file, written, tmp_path, monkeypatch):
    """JSON escapes quotes and what is not ASCII, an address nearly everything."""
    secret, home = 'pl"nted\\p\u00e4ssword/1', "/Z\u00fcrich, \u6771\u4eac/m\u00fcller"
    monkeypatch.setenv("MY_PASSWORD", secret)
    monkeypatch.setenv("HOME", home)
    assert "the value of MY_PASSWORD" in refused({file: f"a {written(secret)} b".encode()}, tmp_path)
    assert "a path of this machine" in refused({file: f"a {written(home)} b".encode()}, tmp_path)


def test_a_virtual_environment(tmp_path, monkeypatch):
    """Its folder is the user's; that of the Python that it was made from may be on any machine."""
    here, base = tmp_path / "venv", tmp_path / "python3.11"
    monkeypatch.setattr("sys.prefix", str(here))
    monkeypatch.setattr("sys.base_prefix", str(base))
    assert "a path of this machine" in refused({"a.json": f"{here}/bin/python".encode()}, Path("/elsewhere/model"))
    check_private({"a.json": f"{base}/bin/python".encode()}, Path("/elsewhere/model"))
    monkeypatch.setattr("sys.prefix", str(base))
    check_private({"a.json": f"{base}/bin/python".encode()}, Path("/elsewhere/model"))


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


def test_the_root_is_no_path_of_this_machine(monkeypatch):
    """As the home of a user in a container; every address has two of its bars."""
    monkeypatch.setenv("HOME", "/")
    check_private({"a.json": b"https://huggingface.co/me/model"}, Path("/elsewhere/model"))


def test_words_of_a_vocabulary_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/app")
    check_private({"tokenizer.json": b'{"/app/": 7}'}, tmp_path)


def test_short_values_are_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", "abc")
    check_private({"a.json": b"abc", "empty.txt": b""}, tmp_path)
