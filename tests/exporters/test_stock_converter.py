"""Uniform models through llama.cpp's own converter, unmodified, where a variable names the sources of llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from exporters.to_gguf.llama_cpp import LlamaCpp
from selfpruner_hub.pruner import AutoPruner

VARIABLE = "SELFPRUNER_LLAMA_CPP"
"""Names the folder of `convert_hf_to_gguf.py`, which the source distribution of xllamacpp has among others."""
QUICK = {"data": "self", "window": 32, "calibration_tokens": 1024, "fitness_tokens": 256, "fisher_tokens": 256}
FIELDS = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_experts": 8,
    "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
MIXTURES = {
    "qwen2_moe": (Qwen2MoeConfig, {"shared_expert_intermediate_size": 32}),
    "qwen3_moe": (Qwen3MoeConfig, {"norm_topk_prob": True}),
}
PROMPTS = ("The Eiffel Tower is in", "def fibonacci(n):", "Water boils at", "In 1969,", "A poem about snow:")
TOKENS = 24


def mixture_of(name: str, words: int):
    kind, fields = MIXTURES[name]
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](kind(vocab_size=words, **FIELDS, **fields)).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(3)  # so that the likeliest token is much likelier than others
    return model


@pytest.mark.slow
@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names the folder of llama.cpp's converter")
@pytest.mark.parametrize("name", ["the real model", *MIXTURES])
def test_llama_cpp_writes_the_tokens_of_transformers(name, real_dense, real_pruner, tmp_path):
    pytest.importorskip("xllamacpp")
    pytest.importorskip("sentencepiece", reason="the converter of Llama models imports it: pip install sentencepiece")
    pruner, tokenizer = real_pruner, AutoTokenizer.from_pretrained(real_dense)
    if name in MIXTURES:
        pruner = AutoPruner(mixture_of(name, len(tokenizer)), tokenizer, f"tests/{name}")
    pruner.prune(0.3, uniform=True, progress=False, **QUICK).save_pretrained(tmp_path / "model")
    convert = [Path(os.environ[VARIABLE]) / "convert_hf_to_gguf.py", tmp_path / "model", "--outtype", "f32"]
    words = [sys.executable, *map(str, convert), "--outfile", str(tmp_path / "model.gguf")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32, trust_remote_code=False)
    run = LlamaCpp(tmp_path / "model.gguf", 128, exact=True)
    for text in PROMPTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        written = stock.generate(ids, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None)[0].tolist()
        for place in range(ids.shape[1], len(written)):
            likeliest = run.likeliest(written[:place])
            assert max(likeliest, key=likeliest.get) == written[place], (text, place)
