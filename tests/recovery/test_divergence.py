"""The loss of recovery and its gradient, beside what PyTorch computes of all logits at once."""

from __future__ import annotations

import pytest
import torch
from support.tiny import DISTINCT, tiny_model, tiny_pruned
from torch.nn import functional as F

from selfpruner_hub.recovery import divergence
from selfpruner_hub.recovery.divergence import distilled

IDS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))
COUNTED = torch.rand(3, 15, generator=torch.Generator().manual_seed(1)) > 0.3
BATCH = {"input_ids": IDS, "counted": COUNTED}


def of_all_logits(student, parent):
    """Mean of the divergences, from the models' own logits."""
    with torch.no_grad():
        theirs = parent(IDS).logits[:, :-1][COUNTED].log_softmax(-1)
    ours = student(IDS).logits[:, :-1][COUNTED].log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@pytest.mark.parametrize("name", DISTINCT)
def test_loss_and_gradient_are_those_of_all_logits(name, monkeypatch):
    parent, student = tiny_model(name), tiny_pruned(name)
    head = student.get_output_embeddings().weight
    with torch.no_grad():  # training moves it away from the parent's
        head.add_(0.02 * torch.randn(head.shape, generator=torch.Generator().manual_seed(2)))
    wanted = of_all_logits(student, parent)
    wanted.backward()
    gradients = {key: parameter.grad for key, parameter in student.named_parameters()}
    student.zero_grad(set_to_none=True)
    monkeypatch.setattr(divergence, "BLOCK_BYTES", 4 * 128 * 7)  # blocks of seven positions
    loss = distilled(student, student, parent, BATCH, torch.float32)
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-6)
    for key, parameter in student.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-6, msg=key)


def test_a_frozen_head_gets_no_gradient():
    parent, student = tiny_model("llama"), tiny_pruned("llama")
    student.lm_head.weight.requires_grad_(False)
    distilled(student, student, parent, BATCH, torch.float32).backward()
    assert student.lm_head.weight.grad is None
    assert student.model.layers[0].mlp.down_proj.weight.grad.abs().max() > 0


def test_no_logits_of_all_positions_are_made(monkeypatch):
    parent, student = tiny_model("llama"), tiny_pruned("llama")
    monkeypatch.setattr(divergence, "BLOCK_BYTES", 4 * 128 * 7)
    made = []
    linear = F.linear

    def watched(x, weight, bias=None):
        if len(weight) == 128:
            made.append(x.numel() // x.shape[-1])
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", watched)
    distilled(student, student, parent, BATCH, torch.float32).backward()
    assert max(made) <= 7  # the student's own pass computes the last position of each of 3 windows
