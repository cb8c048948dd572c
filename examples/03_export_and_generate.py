"""Write a pruned model as ONNX and as GGUF, and let ONNX Runtime write text.

pip install "selfpruner-hub[onnx,gguf]"
python examples/03_export_and_generate.py HuggingFaceTB/SmolLM2-135M-Instruct
"""

import sys

from exporters import OnnxCausalLM
from selfpruner_hub import AutoPruner

name = sys.argv[1]
pruned = AutoPruner.from_pretrained(name).prune(beta=0.3, evaluations=0)  # 0: take the best seed, without a search

# Each export is loaded by its runtime, and its logits are compared with those of PyTorch.
pruned.export("onnx", "pruned-onnx")
pruned.export("gguf", "pruned-gguf", dtype="f16")

model = OnnxCausalLM.from_pretrained("pruned-onnx")
prompt = pruned.tokenizer("The capital of France is", return_tensors="pt")
written = model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(pruned.tokenizer.decode(written[0]))
print("To serve it with llama.cpp: llama-server -m pruned-gguf/model-f16.gguf")
