"""Whatever state a model object and its thread are in, pruning, measuring and exporting work on the same model."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from support.tiny import tiny_model, tiny_tokenizer
from support.trained import VOCABULARY, trained_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from exporters import OnnxCausalLM
from exporters.export import export_model
from selfpruner_hub.errors import UserError
from selfpruner_hub.models.patching import working_on
from selfpruner_hub.pruned_model import PrunedModel
from selfpruner_hub.pruner import AutoPruner

TEXT = ["The quick brown fox jumps over the lazy dog. " * 24]
SETTINGS = {
    "data": TEXT, "window": 16, "calibration_tokens": 512, "fisher_tokens": 128, "fitness_tokens": 128,
    "progress": False,
}  # fmt: skip
IDS = torch.randint(3, 128, (2, 40), generator=torch.Generator().manual_seed(0))


def noisy(training):
    """A model whose outputs are random in train mode."""
    return tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5).train(training)


def prune(model):
    return AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(0.3, **SETTINGS)


@pytest.fixture(scope="module")
def plain():
    """Weights of the pruned model, made from a model in eval mode."""
    return prune(noisy(training=False)).model.state_dict()


@pytest.mark.parametrize(
    ("state", "training"),
    [
        (contextlib.nullcontext(), True),
        (torch.no_grad(), False),
        (torch.inference_mode(), False),
        (torch.autocast("cpu", dtype=torch.bfloat16), False),
    ],
    ids=["train", "no_grad", "inference_mode", "autocast"],
)
def test_the_pruned_model_does_not_depend_on_the_state_of_the_caller(state, training, plain):
    model = noisy(training)
    with state:
        made = prune(model)
    assert model.training == training
    assert not made.model.training
    assert all(torch.equal(value, plain[name]) for name, value in made.model.state_dict().items())


def test_a_model_in_train_mode_is_measured_without_dropout(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT[0])
    model, asked = noisy(training=False), (str(tmp_path / "text.txt"),)
    pruned = prune(model)
    found = []
    for training in (False, True):
        pruned.model.train(training)
        model.train(training)
        found.append(pruned.evaluate(*asked, window=16, dense=model))
        assert pruned.model.training == model.training == training
    assert found[0] == found[1]
    assert not pruned.retrained(pruned.model, "by hand").model.training


def test_a_model_in_train_mode_is_exported_without_dropout_and_left_so(tmp_path):
    model = tiny_model("llama", num_hidden_layers=2, attention_dropout=0.5, vocab_size=VOCABULARY).train()
    export_model(model, trained_tokenizer(), "gguf", tmp_path / "out")
    assert model.training


def test_a_second_thread_is_refused_and_the_model_is_whole():
    model, said = noisy(training=False), []
    before = [parameter.clone() for parameter in model.parameters()]

    def second():
        try:
            prune(model)
        except UserError as error:
            said.append(str(error))

    def tell(what, *_):
        if what == "repairing" and not said:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join()

    AutoPruner(model, tiny_tokenizer(), "tests/llama").prune(0.3, **{**SETTINGS, "progress": tell})
    assert said == [
        "Another thread works on this model object. Wait until it has finished, or load the model once for each thread."
    ]
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))


SOLVES = ("linalg_cholesky_ex", "cholesky_solve", "cholesky_inverse", "linalg_solve_triangular")


class _Precisions(TorchDispatchMode):
    """Precisions of float32 products on a CPU and on CUDA, at each factorisation and solve and each sum of products."""

    def __init__(self):
        super().__init__()
        self.seen = {name: set() for name in (*SOLVES, "addmm_")}

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.seen:
            self.seen[name].add(torch.backends.mkldnn.matmul.fp32_precision)
            self.seen[name].add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_no_factorisation_or_solve_rounds_its_factors(plain):
    """As it would where the process asks for faster products of float32 matrices."""
    torch.set_float32_matmul_precision("medium")
    try:
        with _Precisions() as found:
            made = prune(noisy(training=False))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert found.seen == dict.fromkeys(found.seen, {"ieee"})
    assert made.model.state_dict().keys() == plain.keys()


@pytest.mark.parametrize("path", ["mlp.up_proj", "self_attn.v_proj", "mlp.gate_proj"])
def test_a_layer_that_was_pruned_by_zeroing_is_pruned(path):
    model = noisy(training=False)
    model.model.layers[1].get_submodule(path).weight.data.zero_()
    bias = model.model.layers[1].get_submodule(path).bias
    if bias is not None:
        bias.data.zero_()
    made = prune(model)
    assert made.model(IDS).logits.isfinite().all()
    assert made.report.metrics["search_fitness"].value < 0.2


def test_a_converted_model_is_pruned_as_a_loaded_one_is(tmp_path):
    """`model.to(torch.bfloat16)` rounds the rotary frequencies, which loading in bfloat16 does not."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    converted = tiny_model("llama", num_hidden_layers=2).to(torch.bfloat16)
    one, two = prune(loaded), prune(converted)
    assert all(map(torch.equal, one.model.parameters(), two.model.parameters()))
    assert torch.equal(one(IDS).logits, two(IDS).logits)


@pytest.mark.heavy
def test_an_export_of_a_converted_model_has_the_frequencies_of_its_configuration(tmp_path):
    pruned = prune(tiny_model("llama", num_hidden_layers=2))
    pruned.save_pretrained(tmp_path / "saved")
    kept = PrunedModel.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    before = kept.model.to(torch.float32)(IDS).logits
    pruned.model.to(torch.bfloat16)  # behind the wrapper's back
    pruned.export("onnx", tmp_path / "out")
    exported = OnnxCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(exported(IDS).logits, before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("enter", [lambda _: contextlib.nullcontext(), working_on], ids=["wrapper", "work"])
def test_there_and_back_the_frequencies_are_as_they_were(enter):
    pruned = prune(tiny_model("gemma3", num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"]))
    before = {name: buffer.clone() for name, buffer in pruned.model.named_buffers()}
    (pruned if enter is not working_on else pruned.model).to(torch.bfloat16).to(torch.float32)
    with enter(pruned.model):
        pass
    assert before.keys() == {name for name, _ in pruned.model.named_buffers()}
    assert all(torch.equal(buffer, before[name]) for name, buffer in pruned.model.named_buffers())
