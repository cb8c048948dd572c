"""A lone process that sees several GPUs trains on one of them."""

from __future__ import annotations

import pytest
import torch
from support.tiny import tiny_model, tiny_pruned, tiny_tokenizer
from torch import nn

from selfpruner_hub.recovery import task as module
from selfpruner_hub.recovery.distiller import arguments
from selfpruner_hub.recovery.recover import recover
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.recovery.task import Pair
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run


@pytest.fixture
def several_gpus(monkeypatch):
    """transformers counts four GPUs, and chooses a device as on such a machine; no batch may be split over them."""

    def split(*_, **__):
        raise AssertionError("the batch was split by DataParallel")

    def on_gpus(folder, _device, *rest, **more):
        made.append(arguments(folder, torch.device("cuda"), *rest, **more))
        return made[-1]

    made = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(nn.DataParallel, "__init__", split)
    monkeypatch.setattr(module, "arguments", on_gpus)
    return made


def test_a_lone_process_never_splits_a_batch_over_several_gpus(several_gpus, tmp_path):
    pair = Pair(tiny_pruned("llama"), tiny_model("llama"), tiny_tokenizer())
    text = ["The quick brown fox jumps over the lazy dog. " * 100]
    settings = resolve_recovery(window=32, batch_tokens=64, learning_rate=2e-3, warmup=2, checks=1)
    run = Run(checkpoints=Checkpoints(tmp_path / "stages"))
    found = recover(pair, RecoveryBudget(tokens=64 * 8), text, settings, run, tmp_path / "training")
    (made,) = several_gpus
    assert (made.use_cpu, made.n_gpu, made.train_batch_size) == (False, 1, 2)
    assert (found.record["steps"], found.record["tokens"]) == (8, 64 * 8)
