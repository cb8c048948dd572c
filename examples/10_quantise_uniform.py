"""Quantise a uniform model, which is a stock one, to FP8 with torchao; save it, load it, and let it write.

pip install "torchao>=0.18,<0.19"
selfpruner prune HuggingFaceTB/SmolLM2-135M-Instruct --beta 0.3 --uniform --output smollm2-u30
python examples/10_quantise_uniform.py smollm2-u30
"""

import sys

import torch
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Float8WeightOnlyConfig, PerRow
from transformers import AutoModelForCausalLM, AutoTokenizer, TorchAoConfig

# FP8 products need a GPU of compute capability 8.9; elsewhere the weights alone are in FP8, and are multiplied widened.
fast = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
kind = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()) if fast else Float8WeightOnlyConfig()
name, device = sys.argv[1], "cuda" if fast else "cpu"

model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16).to(device)  # no remote code
tokenizer = AutoTokenizer.from_pretrained(name)
config = TorchAoConfig(kind, modules_to_not_convert=["lm_head"])
quantised = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, quantization_config=config)
quantised.save_pretrained("uniform-fp8")
tokenizer.save_pretrained("uniform-fp8")

again = AutoModelForCausalLM.from_pretrained("uniform-fp8").to(device)
prompt = tokenizer("The capital of France is", return_tensors="pt").to(device)
print(tokenizer.decode(again.generate(**prompt, max_new_tokens=20, do_sample=False)[0]))
with torch.inference_mode():
    changed = (again(**prompt).logits - model(**prompt).logits).abs().max().item()
print(f"A logit changes by {changed:.2f} at most.")
