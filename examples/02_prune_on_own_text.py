"""Prune a chat model on your own conversations: three parts of them to one part of articles.

python examples/02_prune_on_own_text.py HuggingFaceTB/SmolLM2-135M-Instruct conversations.jsonl

Each line of the file is one conversation:
{"messages": [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": "How can I help?"}]}
The default settings take 68 k tokens of it here. A shorter file is enough if it has half as many.
"""

import sys

from selfpruner_hub import AutoPruner

name, conversations = sys.argv[1:]
pruner = AutoPruner.from_pretrained(name)
pruned = pruner.prune(beta=0.3, data=f"{conversations}+wikitext2", shares=(3, 1))
pruned.save_pretrained("pruned-own-text")

for use, text in pruned.report.data.items():
    print(f"{use}: {text['tokens']} tokens of {text['name']}")

question = [{"role": "user", "content": "What is the capital of France?"}]
prompt = pruned.tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(pruned.device)
written = pruned.model.generate(**prompt, max_new_tokens=20, do_sample=False)
print(pruned.tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
