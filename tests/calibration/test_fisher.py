"""The Fisher information of outputs against the loss that noise on them causes, and against one whole backward pass."""

from __future__ import annotations

import pytest
import torch
from support.tiny import DISTINCT, tiny_model, tiny_tokenizer

from selfpruner_hub.calibration import fisher as module
from selfpruner_hub.calibration.fisher import output_fisher
from selfpruner_hub.errors import ModelError
from selfpruner_hub.models.architectures import architecture_of, decoder_layers, linear
from selfpruner_hub.pruner import AutoPruner
from selfpruner_hub.storage.checkpoints import Checkpoints
from selfpruner_hub.storage.run import Run

WINDOWS = torch.randint(3, 128, (256, 16), generator=torch.Generator().manual_seed(0))


def outputs(model, index):
    architecture, layer = architecture_of(model.config), decoder_layers(model)[index]
    return [linear(layer, path) for path in (architecture.attention_output, architecture.ffn_output)]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("index", [0, 2])
def test_it_predicts_the_divergence_of_small_noise_in_any_direction(index, part, monkeypatch):
    """½ E‖R δ‖² is the KL divergence that noise δ on an output causes, to second order: of all, the most, the least."""
    monkeypatch.setattr(module, "DAMPING", 1e-3)
    model = tiny_model("llama")
    root = output_fisher(model, WINDOWS)[index][part]
    with torch.no_grad():
        dense = model(WINDOWS).logits.log_softmax(-1)
    generator, scales = torch.Generator().manual_seed(1), []
    directions = torch.linalg.eigh(root.t() @ root).eigenvectors.t()
    for basis in (directions, directions[-1:], directions[:1]):
        scale = 2e-2 / (root @ basis.t()).norm() * root.norm()

        def add(_module, _args, y, basis=basis, scale=scale):
            return y + scale * torch.randn((*y.shape[:-1], len(basis)), generator=generator) @ basis

        handle = outputs(model, index)[part].register_forward_hook(add)
        with torch.no_grad():
            noisy = model(WINDOWS).logits.log_softmax(-1)
        handle.remove()
        measured = (dense.exp() * (dense - noisy)).sum(-1).mean().item()
        assert (scale * root @ basis.t()).square().sum() / 2 == pytest.approx(measured, rel=0.3)
        scales.append(scale)
    assert scales[2] > 1.5 * scales[1]  # one direction bears more noise than another for the same loss


@pytest.mark.parametrize("architecture", DISTINCT)
def test_layer_by_layer_it_is_what_one_backward_pass_gives(architecture, monkeypatch):
    """With labels that do not depend on chance: those of the least logit."""
    monkeypatch.setattr(module, "draw", lambda logits, _temperature, _generator: logits.argmin(-1))
    monkeypatch.setattr("selfpruner_hub.models.layer_stream.LAYER_BATCH_TOKENS", 48)  # batches of unequal size
    model, windows = tiny_model(architecture), WINDOWS[:7]
    found = output_fisher(model, windows)
    seen = [each for index in range(len(decoder_layers(model))) for each in outputs(model, index)]
    kept = []

    def keep(_module, _args, output):
        output.retain_grad()
        kept.append(output)

    handles = [each.register_forward_hook(keep) for each in seen]
    logits = model(windows).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, logits.argmin(-1), reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for root, output in zip((each for pair in found for each in pair), kept, strict=True):
        g = output.grad.flatten(0, 1)
        expected = g.t() @ g / windows.numel()
        expected += module.DAMPING * expected.diagonal().mean() * torch.eye(len(expected))
        torch.testing.assert_close(root.t() @ root, expected, atol=1e-4 * expected.max().item(), rtol=1e-3)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(each._forward_hooks for each in model.modules())
    assert not any("forward" in vars(layer) for layer in decoder_layers(model))


def test_it_is_taken_from_its_checkpoints(tmp_path):
    model = tiny_model("llama")
    first = output_fisher(model, WINDOWS[:8], Run(checkpoints=Checkpoints(tmp_path)))
    again = output_fisher(model, WINDOWS[8:16], Run(checkpoints=Checkpoints(tmp_path)))  # windows are not looked at
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    (tmp_path / "fisher-1.safetensors").unlink()
    other = output_fisher(model, WINDOWS[8:16], Run(checkpoints=Checkpoints(tmp_path)))
    assert not torch.equal(other[0][0], first[0][0])


def test_activations_that_are_not_finite_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with pytest.raises(ModelError, match="not finite"):
        output_fisher(model, WINDOWS[:4])


@pytest.mark.parametrize(("tokens", "windows"), [(1, 1), (100, 3), (1e6, 16)])
def test_a_setting_says_how_much_text_it_reads(tokens, windows, monkeypatch):
    read = []

    def spy(model, found, *args):
        read.append(found)
        return output_fisher(model, found, *args)

    monkeypatch.setattr("selfpruner_hub.pruning.prepare.output_fisher", spy)
    AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
        0.3, data="self", proposer="evolution", window=32, calibration_tokens=512, fisher_tokens=int(tokens),
        fitness_tokens=128, evaluations=0, progress=False,
    )  # fmt: skip
    assert [len(found) for found in read] == [windows]
