"""OpenVINO: the cache is the runtime's own state; checked against PyTorch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from support.checks import check_cache, check_left_padding, logits
from support.tiny import shallow, tiny_tokenizer

from exporters.export import export_model
from exporters.parity import expected, logit_difference
from exporters.to_openvino.causal_lm import OpenVinoCausalLM
from selfpruner_hub.errors import MissingExtraError, SavedModelError, UserError
from selfpruner_hub.storage.export_record import read_export

pytestmark = pytest.mark.heavy
IDS = torch.randint(3, 128, (2, 30), generator=torch.Generator().manual_seed(0))
installed = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason='not installed: pip install "selfpruner-hub[openvino]"'
)

INTERRUPTED = """
import gc, signal, sys
from exporters.to_openvino.causal_lm import OpenVinoCausalLM
models = [OpenVinoCausalLM.from_pretrained(sys.argv[1]) for _ in range(2)]
while models:
    del models[0]
    gc.collect()
signal.signal(signal.SIGINT, lambda *caught: print("caught"))
signal.raise_signal(signal.SIGINT)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_model(shallow("llama"), tiny_tokenizer(), "openvino", tmp_path_factory.mktemp("ov") / "out")


@installed
@pytest.mark.slow
def test_another_architecture(tmp_path):
    model = shallow("gemma3")
    export_model(model, tiny_tokenizer(), "openvino", tmp_path / "out")
    assert read_export(tmp_path / "out", "openvino").max_difference <= 1e-4
    graph = OpenVinoCausalLM.from_pretrained(tmp_path / "out")
    assert logit_difference(expected(model, prompts=(30, 30), steps=12), graph) <= 1e-4


@installed
@pytest.mark.slow
def test_it_does_what_a_model_does(exported):
    graph, model = OpenVinoCausalLM.from_pretrained(exported), shallow("llama")
    assert read_export(exported).max_difference <= 1e-4
    check_left_padding(graph, IDS, pad=0)
    check_cache(graph, IDS[:, :10])
    for how in ({}, {"num_beams": 3}):
        texts = [m.generate(IDS, max_new_tokens=16, do_sample=False, **how).tolist() for m in (graph, model)]
        assert texts[0] == texts[1]
    torch.testing.assert_close(logits(graph, IDS, logits_to_keep=1), logits(model, IDS)[:, -1:], atol=1e-4, rtol=0)


@installed
@pytest.mark.slow
def test_the_state_of_another_batch_is_refused(exported):
    graph = OpenVinoCausalLM.from_pretrained(exported)
    first = graph(IDS)
    graph(IDS[:1])
    with pytest.raises(UserError, match="state of one batch, and it is of another one by now"):
        graph(IDS[:, :1], cache=first.cache)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("openvino_model.xml", lambda path: path.write_text(path.read_text()[:5000])),
        ("openvino_model.bin", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("openvino_model.bin", lambda path: path.unlink()),
        ("openvino_model.xml", lambda path: path.unlink()),
    ],
)
def test_damaged_exports(file, damage, exported, tmp_path):
    directory = shutil.copytree(exported, tmp_path / "out")
    damage(directory / file)
    with pytest.raises(SavedModelError, match="damaged or cut off") as raised:
        OpenVinoCausalLM.from_pretrained(directory)
    assert "\n" not in str(raised.value)


@installed
@pytest.mark.slow
def test_an_interrupt_after_models_are_gone(exported):
    """It reaches Python: the signal stack that OpenVINO gave this thread is still there."""
    done = subprocess.run([sys.executable, "-c", INTERRUPTED, exported], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "caught\n"), done.stderr[-500:]


@installed
@pytest.mark.slow
def test_a_device_that_is_not_there(exported):
    with pytest.raises(UserError, match="no device 'NPU' here.*CPU"):
        OpenVinoCausalLM.from_pretrained(exported, device="NPU")


def test_without_openvino(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a))
    with pytest.raises(MissingExtraError, match=r'pip install "selfpruner-hub\[openvino\]"'):
        export_model(shallow("llama"), None, "openvino", tmp_path / "out")
    assert not list(tmp_path.iterdir())
