"""Whatever is given in place of an argument is one line with a remedy, before any work."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub import AutoPruner, PrunedModel
from selfpruner_hub.errors import SelfPrunerError

ODD = {
    "number": 5, "negative": -1, "fraction": 1.5, "nan": float("nan"), "flag": True, "huge": 10**30, "list": [],
    "dictionary": {"a": 1}, "object": SimpleNamespace(), "bytes": b"x", "zero byte": "\0", "nothing": None,
}  # fmt: skip
TEXT = ["the quick brown fox jumps over the lazy dog " * 300]


class Began(Exception):  # noqa: N818
    """The work has begun, so all arguments were accepted."""


def began(*_):
    raise Began


@pytest.fixture(scope="module")
def pruner():
    return AutoPruner(tiny_model("llama", num_hidden_layers=2), tiny_tokenizer(), "tests/llama")


def refusal(act):
    """The refusal of an argument; None where it is accepted."""
    try:
        act()
    except Began:
        return None
    except SelfPrunerError as error:
        return error
    return None


def accepted_or_clear(act):
    if (error := refusal(act)) is not None:
        assert "\n" not in str(error)
        assert error.message.endswith(".")


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
@pytest.mark.parametrize(
    "name", ["target", "runtime", "request", "proposer", "data", "minutes", "recover", "seed", "run_dir"]
)
def test_prune(name, value, pruner, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"data": TEXT, "window": 32, "calibration_tokens": 320, "fitness_tokens": 128, "progress": began}
    given |= {"target": {"memory": 0.8}} if name in ("runtime", "request") else {}
    given |= {"beta": 0.3} if name not in ("runtime", "request", "target") else {}
    accepted_or_clear(lambda: pruner.prune(**{**given, name: value}))


@pytest.mark.parametrize("value", ODD.values(), ids=ODD)
def test_the_rest(value, pruner, saved_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = pruner.model
    pruned = PrunedModel.from_pretrained(saved_model, device="cpu")
    model.save_pretrained("dense")
    for act in (
        lambda: AutoPruner(value, None, "x"),
        lambda: AutoPruner(model, value, "x"),
        lambda: AutoPruner(model, None, value),
        lambda: AutoPruner.from_pretrained(value),
        *(lambda name=name: AutoPruner.from_pretrained("dense", **{"device": "cpu", name: value}) for name in LOADING),
        lambda: pruned.recover(value, tokens=4096, data=TEXT, progress=began),
        lambda: pruned.recover(model, tokens=4096, data=TEXT, progress=began, run_dir=value),
        lambda: pruned.evaluate("text.txt", dense=value),
        lambda: pruned.retrained(value, "by hand"),
        lambda: pruned.retrained(pruned.model, value),
        lambda: pruned.save_pretrained(value),
        lambda: pruned.export("gguf", value),
        lambda: pruned.export(value, "out"),
        lambda: pruned.push_to_hub(value),
        lambda: pruned.push_to_hub("me/model", exports=value),
    ):
        accepted_or_clear(act)


LOADING = ("device", "base_model", "offload_folder", "dtype")
