"""Prune a model, recover it from its parent on text that the parent writes, and say what that brought.

python examples/09_recover.py HuggingFaceTB/SmolLM2-135M-Instruct [TOKENS]
"""

import sys

from selfpruner_hub import AutoPruner

name = sys.argv[1]
tokens = int((sys.argv[2:] or ["131072"])[0])  # or minutes=30
pruner = AutoPruner.from_pretrained(name)
pruned = pruner.prune(beta=0.3)

recovered = pruned.recover(pruner.model, tokens=tokens)
if recovered is pruned:
    print("Recovery did not help: the model is the cut one.")
recovered.save_pretrained("recovered-b30")
for text in (recovered.report.recovery or {}).get("deciding", []):
    print(f"KL from the parent on {text['name']}: {text['before']:.3f} before, {text['after']:.3f} after")
