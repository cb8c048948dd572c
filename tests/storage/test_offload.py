"""Tensors in files: the same values, the same pruned model to the bit, and little of them in memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys

import pytest
import torch
from support.tiny import save_tiny, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from selfpruner_hub.errors import ModelError, OutputError, UserError
from selfpruner_hub.models.loading import load_model
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage import offload as shelves
from selfpruner_hub.storage.offload import DiskStore, HostStore

SETTINGS = {
    "data": "self", "proposer": "evolution", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 128,
    "evaluations": 6, "progress": False,
}  # fmt: skip


def test_values_survive_their_release(tmp_path):
    shelf = DiskStore(tmp_path / "new")
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(4, 4).bfloat16().t(), torch.zeros(0)]
    kept = [shelf(tensor) for tensor in tensors]
    kept[0][1] = 9  # written to the file
    tensors[0][1] = 9
    shelf.release()
    for tensor, same in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, same)
    assert not list((tmp_path / "new").iterdir())  # files without names


def test_values_survive_on_the_host(monkeypatch):
    """In blocks that several tensors share, each with the memory order that it had."""
    monkeypatch.setattr(shelves, "ARENA", 256)
    shelf = HostStore(pinned=False)
    tensors = [torch.randn(3, 5), torch.arange(7), torch.randn(4, 4).bfloat16().t(), torch.randn(100), torch.zeros(0)]
    kept = [shelf(tensor) for tensor in tensors]
    for tensor, same in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, same)
        assert tensor.stride() == same.stride()
    assert all(same.data_ptr() != tensor.data_ptr() for tensor, same in zip(tensors[:4], kept, strict=False))
    assert kept[1].data_ptr() - kept[0].data_ptr() == 64  # side by side in one block
    assert all(same.untyped_storage().nbytes() == same.nbytes for same in kept[:4])  # each is saved alone
    kept[0].zero_()
    assert torch.equal(kept[1], tensors[1])


def test_files_end_with_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(shelves, "ARENA", 4096)
    shelf = DiskStore(tmp_path)
    kept = [shelf(torch.full((1024,), i)) for i in range(10)]
    held = kept[3].narrow(0, 1, 4)
    del kept
    gc.collect()
    assert len(shelf._arenas) == 2  # that of the view, and the last
    assert held.tolist() == [3, 3, 3, 3]


def test_a_directory_that_cannot_be_written_is_told_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot keep tensors"):
        DiskStore(tmp_path / "file" / "below")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])  # apart, with normalised outputs, fused
def test_the_pruned_model_is_the_same_to_the_bit(architecture, tmp_path):
    saved = str(save_tiny(architecture, tmp_path / "dense"))
    plans, weights = [], []
    for keywords in ({}, {"offload_folder": tmp_path / "scratch"}):
        pruned = AutoPruner.from_pretrained(saved, **keywords).prune(0.3, **SETTINGS)
        plans.append(pruned.plan)
        weights.append(pruned.model.state_dict())
    assert plans[0] == plans[1]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_what_cannot_be_offloaded_is_refused(tmp_path):
    saved = str(save_tiny("llama", tmp_path / "dense"))
    with pytest.raises(UserError, match="offloaded to files. Give a device instead"):
        load_model(saved, store=DiskStore(tmp_path), device_map="auto")
    with pytest.raises(UserError, match="There is no device 'cuda:7'"):
        load_model(saved, store=DiskStore(tmp_path), device="cuda:7")
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**config, "intermediate_size": 32}))
    with pytest.raises(ModelError, match="do not fit"):
        load_model(saved, store=DiskStore(tmp_path))
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        load_model(saved, store=DiskStore(tmp_path))


def test_a_folder_of_a_model_is_read_from_that_folder(tmp_path):
    """Beside another model of the same shape, as checkpoints of a training are."""
    for seed, folder in ((0, tmp_path / "runs"), (1, tmp_path / "runs" / "checkpoint-1")):
        tiny_model("llama", seed=seed).save_pretrained(folder)
    found, _ = load_model(str(tmp_path / "runs"), store=DiskStore(tmp_path / "store"), subfolder="checkpoint-1")
    assert torch.equal(found.state_dict()["lm_head.weight"], tiny_model("llama", seed=1).lm_head.weight)


def test_a_keyword_that_would_have_no_effect_is_refused(tmp_path):
    saved = str(save_tiny("llama", tmp_path / "dense"))
    found, _ = load_model(saved, store=DiskStore(tmp_path / "store"), attn_implementation="eager")
    assert found.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="rope_parameters has no effect on a model in files"):
        load_model(saved, store=DiskStore(tmp_path / "store"), rope_parameters={"rope_theta": 1e6})


def test_missing_weights_are_told(tmp_path):
    model = tiny_model("llama")
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    model.save_pretrained(tmp_path / "dense", state_dict=state)
    with pytest.raises(ModelError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(tmp_path / "dense"), store=DiskStore(tmp_path))


PROGRAM = """
import sys, threading, time
import torch
from pathlib import Path
from selfpruner_hub.storage import offload
from selfpruner_hub.pruner import AutoPruner

torch.set_num_threads(1)
status = lambda key: next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) * 1024
offload.ARENA = offload.RESIDENT = 2**25
before, own, peak = status("VmRSS"), status("RssAnon"), [0]
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

def watch():
    while True:
        peak[0] = max(peak[0], status("RssAnon"))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
pruner = AutoPruner.from_pretrained(sys.argv[1], offload_folder=sys.argv[2])
tokens = torch.randint(3, 1000, (8, 32))
from selfpruner_hub.calibration.corpus import Corpus
from selfpruner_hub.calibration.texts import RunTexts, Texts
Texts.read = lambda self, *rest: RunTexts(Corpus.of("drawn", tokens), Corpus.of("drawn", tokens[:2]), None)
pruned = pruner.prune(0.3, evaluations=0, seeds=("uniform",), importance="wanda-sp", progress=False)
pruned.save_pretrained(sys.argv[3], max_shard_size="100MB")
print(status("VmHWM") - before, peak[0] - own)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc")
def test_a_model_is_pruned_in_less_memory_than_it_takes(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=1000, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = model.to_empty(device="cpu")
    model.init_weights()
    model.save_pretrained(tmp_path / "dense", max_shard_size="100MB")
    size = sum(p.nbytes for p in model.parameters())
    assert size > 0.2e9
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 1
    del model
    words = [sys.executable, "-c", PROGRAM, *(str(tmp_path / name) for name in ("dense", "scratch", "pruned"))]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    resident, own = map(int, done.stdout.split())
    assert own < 0.7 * size  # what is not in files
    assert resident < 1.6 * size  # about 0.4, and pages of files that a loaded machine has not put away yet
    assert len(list((tmp_path / "pruned").glob("*.safetensors"))) > 1


def test_generation_settings_of_a_file_are_kept(tmp_path):
    model = tiny_model("llama")
    model.generation_config = GenerationConfig(eos_token_id=[1, 106], top_p=0.9, do_sample=True)
    model.save_pretrained(tmp_path / "dense")
    streamed, _ = load_model(str(tmp_path / "dense"), store=DiskStore(tmp_path / "scratch"), device="cpu")
    whole, _ = load_model(str(tmp_path / "dense"), device="cpu")
    assert streamed.generation_config.to_dict() == whole.generation_config.to_dict()
    assert streamed.generation_config.eos_token_id == [1, 106]
