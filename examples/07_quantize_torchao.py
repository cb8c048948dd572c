"""Quantise a saved pruned model in PyTorch with torchao: weights in 8 or 4 bits, saved and loaded again.

pip install "torchao>=0.18,<0.19"
python examples/07_quantize_torchao.py smollm2-b30 int8
"""

import sys

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

from selfpruner_hub import PrunedModel  # noqa: F401 - registers pruned models; without it: trust_remote_code=True

GROUP = 32
KINDS = {
    "int8": Int8WeightOnlyConfig(),  # a scale for each row
    "int4": IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)),  # 4 bits of a byte; runs on CPUs, and is no smaller
}
name, kind = sys.argv[1], sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(name)

# The head stays as it is, and so do matrices whose inputs the groups do not divide: few after `prune`, by default.
linear = {path: part for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
kept = [path for path, part in linear.items() if kind == "int4" and part.in_features % GROUP]
config = TorchAoConfig(KINDS[kind], modules_to_not_convert=["lm_head", *kept])
quantised = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=config)
quantised.save_pretrained(f"pruned-{kind}")
tokenizer.save_pretrained(f"pruned-{kind}")
print(f"{len(linear) - 1 - len(kept)} of {len(linear)} matrices are in {kind}.")

again = AutoModelForCausalLM.from_pretrained(f"pruned-{kind}")
prompt = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
with torch.inference_mode():
    changed = (again(**prompt).logits - model(**prompt).logits).abs().max().item()
print(f"A logit changes by {changed:.2f} at most.")
