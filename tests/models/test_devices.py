"""Devices: what is chosen, what is refused, and what is said when memory is short."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model
from support.virtual_device import virtual_accelerator

from selfpruner_hub.errors import ModelError, UserError
from selfpruner_hub.models import devices
from selfpruner_hub.models.devices import (
    check_one_device,
    choose_device,
    described,
    ieee_products,
    out_of_memory,
    summed,
)
from selfpruner_hub.models.loading import explain, load_model
from selfpruner_hub.pruner import AutoPruner


def test_the_accelerator_is_the_default_where_there_is_one():
    assert choose_device() == torch.device("cpu")
    with virtual_accelerator():
        assert choose_device() == choose_device("gpu") == choose_device("gpu:0") == torch.device("gpu", 0)
        assert choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:7", "gpu:1", "meta", "nonsense", ""])
def test_a_device_that_is_not_there(name):
    with virtual_accelerator(), pytest.raises(UserError, match="There is no device .* Choose one of: cpu, gpu:0.$"):
        choose_device(name)
    with pytest.raises(UserError, match="Choose one of: cpu.$"):
        choose_device(name)


@pytest.mark.parametrize("visible", [None, ""])
def test_a_gpu_that_pytorch_does_not_see_is_told_once(visible, tmp_path, monkeypatch, caplog):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(devices, "_NVIDIA", tmp_path / "nvidia0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:  # the user hides it
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    devices._warn_of_unseen_gpu.cache_clear()
    for _ in range(2):
        assert choose_device() == choose_device("cpu") == torch.device("cpu")
    told = [record.message for record in caplog.records if "PyTorch does not see it" in record.message]
    assert len(told) == (1 if visible is None else 0)
    devices._warn_of_unseen_gpu.cache_clear()


def test_device_and_map_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="not by both"):
        load_model(str(tmp_path), device="cpu", device_map="auto")


def test_a_model_on_several_devices_is_not_pruned():
    model = tiny_model("llama")
    check_one_device(model)
    model.lm_head.to("meta")
    with pytest.raises(ModelError, match="spread over cpu, disk; pruning needs it on one device. Leave out device_map"):
        AutoPruner(model, None, "tiny")


def test_device_and_dtype_are_named():
    assert described(tiny_model("llama").bfloat16()) == "cpu, bfloat16"


def test_sums_are_of_float64():
    values = torch.tensor([1e8, 1.0, -1e8])
    assert summed(values) == 1
    with virtual_accelerator():  # it has no float64
        assert summed(values.to("gpu")) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["CUDA", "MPS", "CPU", "Python"],
)
def test_too_little_memory_is_not_a_missing_model(error):
    wrapped = OSError("a library says something else")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        told = explain("example/model", each)
        assert told.message == "Out of memory while 'example/model' was loaded."
        assert told.hint.startswith("Try ")
    assert out_of_memory(ValueError("no")) is None


def products():
    """Precision of float32 products on a CPU, and on CUDA."""
    return torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.mark.parametrize(("setting", "rounded"), [("high", ("tf32", "tf32")), ("medium", ("bf16", "tf32"))])
def test_no_setting_of_the_process_rounds_factors(setting, rounded):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with ieee_products():
            assert products() == ("ieee", "ieee")
            with ieee_products(cpu="bf16"):
                assert products() == ("bf16", "ieee")
            assert products() == ("ieee", "ieee")
        assert products() == rounded
    finally:
        torch.set_float32_matmul_precision(before)
