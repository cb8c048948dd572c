"""What every pruned model must do, whatever its architecture and size; used on tiny models and on the real one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.processes import run_python

REMOTE = """
import sys, json, torch
sys.modules["selfpruner_hub"] = None  # as in an environment that has only torch and transformers
import transformers

def load(auto, directory):
    found = getattr(transformers, auto).from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)
    assert type(found).__module__.startswith("transformers_modules."), type(found).__module__
    return found.eval()

for directory, ids in json.load(open(sys.argv[1])).items():
    model, ids = load("AutoModelForCausalLM", directory), torch.tensor(ids)
    with torch.no_grad():
        torch.save(model(ids).logits, directory + "/remote.pt")
        decoded = model.base_model(ids).last_hidden_state
        for auto in set(model.config.auto_map) - {"AutoConfig", "AutoModelForCausalLM"}:
            assert torch.equal(load(auto, directory).base_model(ids).last_hidden_state, decoded), auto
"""

TOKENIZER = """
import sys, json
sys.modules["selfpruner_hub"] = None
from transformers import AutoTokenizer
found, (directories, texts) = [], json.load(open(sys.argv[1]))
for directory in directories:
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    found.append([tokenizer(texts)["input_ids"], tokenizer.chat_template])
json.dump(found, open(sys.argv[2], "w"))
"""
TEXTS = ["What is the capital of France?", "  def f(x):\n    return x ** 1024", "It's 3.14\t(or so)!"]


def logits(model: PreTrainedModel, ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def check_causality(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Logits of a prefix do not change when tokens follow."""
    half = ids.shape[1] // 2
    torch.testing.assert_close(logits(model, ids)[:, :half], logits(model, ids[:, :half]), atol=1e-4, rtol=1e-4)


def check_cache(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int = 24) -> None:
    """Greedy generation with and without cache agrees, and really writes something."""
    kwargs = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    with_cache = model.generate(ids, use_cache=True, do_sample=False, **kwargs)
    without = model.generate(ids, use_cache=False, do_sample=False, **kwargs)
    assert with_cache.shape[1] == ids.shape[1] + new_tokens
    assert with_cache.tolist() == without.tolist()


def check_left_padding(model: PreTrainedModel, ids: torch.Tensor, pad: int) -> None:
    """The last logits of a left-padded batch of unequal prompts are those of each prompt alone."""
    prompts = [ids[0], ids[0, : ids.shape[1] // 2], ids[0, :3]]
    longest = max(map(len, prompts))
    batch = torch.stack([torch.cat([torch.full((longest - len(p),), pad), p]) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - len(p) for p in prompts]).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    together = logits(model, batch, attention_mask=mask, position_ids=positions)[:, -1]
    alone = torch.stack([logits(model, p[None])[0, -1] for p in prompts])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)


def check_without_package(directories: dict[Path, torch.Tensor], tmp_path: Path) -> dict[Path, torch.Tensor]:
    """Load saved models in a process that cannot import selfpruner_hub, and return their float32 logits.

    Every Auto class that a model names is loaded, and its decoder is compared with that of the language model.
    """
    job = tmp_path / "job.json"
    job.write_text(json.dumps({str(d): ids.tolist() for d, ids in directories.items()}))
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    done = run_python(REMOTE, job, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return {directory: torch.load(directory / "remote.pt") for directory in directories}


def check_tokenizers_without_package(tokenizers: dict[Path, PreTrainedTokenizerBase], tmp_path: Path) -> None:
    """Load saved tokenizers, as the card does, where selfpruner_hub is not: they are equal, and nothing is asked."""
    job, found = tmp_path / "job.json", tmp_path / "found.json"
    job.write_text(json.dumps([[str(directory) for directory in tokenizers], TEXTS]))
    env = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": ""}
    done = run_python(TOKENIZER, job, found, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""  # a question would stand here
    expected = [[tokenizer(TEXTS)["input_ids"], tokenizer.chat_template] for tokenizer in tokenizers.values()]
    assert json.loads(found.read_text()) == expected
