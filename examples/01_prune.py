"""Prune a model, save it, load it again, and let it write.

python examples/01_prune.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

from selfpruner_hub import AutoPruner, PrunedModel

name = sys.argv[1]
pruner = AutoPruner.from_pretrained(name)  # takes the GPU where there is one; device="cpu" does not
pruner.prune(beta=0.3).save_pretrained("pruned-b30")

pruned = PrunedModel.from_pretrained("pruned-b30")
counts = pruned.report.parameters
print(f"{counts['pruned']:,} of {counts['dense']:,} parameters are left.")
print("Share that each layer lost:", [round(rate, 2) for rate in pruned.report.rates])

prompt = pruned.tokenizer("The capital of France is", return_tensors="pt").to(pruned.device)
written = pruned.model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(pruned.tokenizer.decode(written[0]))
