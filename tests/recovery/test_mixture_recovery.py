"""Recovery of mixtures of experts, cut to numbers of their own: of every type, nearer to the whole mixture."""

import pytest
import torch
from support.mixtures import MIXTURES, cut_by, tiny_mixture
from support.tiny import tiny_tokenizer

from selfpruner_hub.recovery.recover import recover
from selfpruner_hub.recovery.settings import RecoveryBudget, resolve_recovery
from selfpruner_hub.recovery.task import Pair
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

SETTINGS = {"window": 32, "batch_tokens": 128, "learning_rate": 3e-4, "warmup": 2, "checks": 1}


@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in MIXTURES), ("qwen2_moe", "lora"), ("mixtral", "lora")]
)
def test_every_mixture(name, method, tmp_path):
    cut = cut_by(tiny_mixture(name), (5, 4, 6)).cut
    pair = Pair(cut, tiny_mixture(name), tiny_tokenizer())
    settings = resolve_recovery(**SETTINGS, method=method)
    found = recover(pair, RecoveryBudget(tokens=128 * 24), "self", settings, Run(), tmp_path)
    assert found.model is not None, found.line
    assert found.record["method"] == method
    assert [w.intermediate_size for w in found.model.config.per_layer_config] == [
        w.intermediate_size for w in cut.config.per_layer_config
    ]
    ids = torch.arange(3, 23)[None]
    assert not torch.equal(found.model(ids).logits, cut(ids).logits)


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_a_stock_mixture_resumes_with_its_experts(name, tmp_path):
    """Its own files have other names than its modules; what Trainer reads must have all of them."""
    pair = Pair(cut_by(tiny_mixture(name), (4, 4, 4), stock=True).cut, tiny_mixture(name), tiny_tokenizer())
    settings = resolve_recovery(**{**SETTINGS, "checks": 3})

    def recovered(folder, progress=lambda *_: None):
        run = Run(checkpoints=Checkpoints(folder / "stages"), progress=progress)
        return recover(pair, RecoveryBudget(tokens=128 * 24), "self", settings, run, folder / "training")

    def stop(what, done, *_):
        if what == "recovering" and done == 20:
            raise KeyError

    whole = recovered(tmp_path / "whole")
    assert whole.model is not None, whole.line
    with pytest.raises(KeyError):
        recovered(tmp_path / "stopped", stop)
    again = recovered(tmp_path / "stopped")
    for (key, value), other in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), key
