"""Let a language model behind an OpenAI-compatible endpoint propose the rates.

SELFPRUNER_API_KEY=… python examples/04_endpoint_proposer.py MODEL URL MODEL_AT_URL
such as: … HuggingFaceTB/SmolLM2-135M-Instruct http://127.0.0.1:8080/v1 qwen3

The key comes from the environment alone. A local server usually needs none.
"""

import sys

from selfpruner_hub import AutoPruner

name, url, model_at_url = sys.argv[1:]
pruner = AutoPruner.from_pretrained(name)
pruned = pruner.prune(
    beta=0.3,
    proposer=url,
    proposer_model=model_at_url,
    proposer_options={"request_limit": 200, "token_limit": 1_000_000},  # retries count too
)
pruned.save_pretrained("pruned-by-endpoint")

search = pruned.report.proposer
print(f"The best plan came from {search['best_from']}.")
print(f"{search['tokens']} tokens were read and written. Replies: {search['replies']}.")
