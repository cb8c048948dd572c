"""GGUF of every type that can be written: 24 greedy tokens and their log-probabilities are PyTorch's.

llama.cpp runs in a process of its own: it aborts on a wrong key, and would take the test session with it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from support.processes import run_python
from support.tiny import CONFIGS, tiny_model, tiny_pruned
from support.trained import VOCABULARY, trained_tokenizer

from exporters.to_gguf.folds import WRITABLE
from exporters.to_gguf.writer import write
from selfpruner_hub.errors import UnsupportedArchitectureError
from selfpruner_hub.models.architectures import shape_of

ROOT = Path(__file__).parents[2]
STEPS, PROMPT = 24, 6
THETA = {"rope_theta": 3e4}
SCALED = {**THETA, "factor": 8.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", **SCALED}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **SCALED}
HALF = {"rope_type": "default", "partial_rotary_factor": 0.5, **THETA}
LATE = {"original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.1, "factor": 2.0}
TIED = {"tie_word_embeddings": True}
WINDOW = {"sliding_window": 64}
CASES = {
    "cwm": WINDOW,
    "ernie4_5": {},
    "glm": {},
    "granite": {"rms_norm_eps": 1e-3},
    "llama": {},
    "ministral": WINDOW,
    "ministral3": {"rope_parameters": {**YARN, **LATE}},
    "mistral": WINDOW,
    "phi3": {},
    "qwen2": {},
    "qwen3 tied": TIED,
    "qwen3": {},
    "seed_oss": {},
    "cwm whole": {"layer_types": ["full_attention"] * 4},
    "granite tied": TIED,
    "llama-mha-tied linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **THETA}},
    "seed_oss llama3": {"rope_parameters": LLAMA3},
    "qwen2 yarn": {"rope_parameters": YARN},
    "ernie4_5 yarn": {"rope_parameters": YARN},
    "glm yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "phi3 partial": {"head_dim": 8, "rope_parameters": HALF},
}
"""Changes of a tiny configuration. Every type is here, and every kind of rotary embedding of both ways to rotate."""
RUN = """
import json, os, sys
from pathlib import Path
from exporters.to_gguf.llama_cpp import LlamaCpp
for name in sys.argv[1:]:
    path = Path(name)
    if (child := os.fork()) == 0:
        run = LlamaCpp(path / "model-f32.gguf", 64, exact=True)
        asked = json.loads((path / "asked.json").read_text())
        bias = [[index, False] for index in asked["never"]]
        replies = [run.complete(ids, 1, n_probs=64, logit_bias=bias)["choices"][0] for ids in asked["ids"]]
        (path / "found.json").write_text(json.dumps([reply["logprobs"]["content"][0] for reply in replies]))
        os._exit(0)
    os.waitpid(child, 0)
"""
"""llama.cpp runs each file in a process of its own, forked from one that has imported the package."""
PAIRS = [(case, make) for case in CASES for make in (tiny_pruned, tiny_model)]
PAIRS = [(case, make) for case, make in PAIRS if make is tiny_pruned or " " not in case]
PAIRS.remove(("qwen3", tiny_pruned))  # with a head of its own, it is written dense only
TOKENIZER = trained_tokenizer()
WHOLE = [index for index in range(len(TOKENIZER)) if "\ufffd" not in TOKENIZER.decode([index])][3:]
NEVER = sorted(set(range(VOCABULARY)) - set(WHOLE))
"""Tokens of whole characters, and the others: after a part of a character, llama.cpp gives no log-probabilities."""


def built(make, case):
    """A model of a case, whose norms of queries and keys matter where it has them."""
    model = make(case.split()[0], vocab_size=VOCABULARY, **CASES[case])
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            torch.nn.init.normal_(parameter, mean=1, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


@torch.inference_mode()
def greedy(model):
    """Ids before each of the steps, and the log-probabilities after them."""
    ids, steps = torch.randint(3, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist(), []
    for _ in range(STEPS):
        steps.append((ids, model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)))
        ids = [*ids, likeliest(steps[-1][1])]
    return steps


def likeliest(log_probabilities):
    return WHOLE[int(log_probabilities[WHOLE].argmax())]


def test_every_type_has_a_case():
    assert {CONFIGS[case.split()[0]].model_type for case in CASES} == set(WRITABLE)
    assert len(WRITABLE) == 12


def test_the_page_of_models_says_which_can_be_written():
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\| (yes|tied) \|", (ROOT / "docs" / "models.md").read_text(encoding="utf-8"), re.M
    )
    assert dict(rows) == {name: "tied" if name == "qwen3" else "yes" for name in WRITABLE}


@pytest.mark.parametrize(
    ("name", "changes", "longest"),
    [
        ("llama", {}, 128),
        ("mistral", {}, 16),
        ("ministral", {}, 16),
        ("cwm", {}, 16),
        ("cwm", {"layer_types": ["full_attention"] * 4}, 128),
        ("ministral3", {}, 16),
        ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.0}}, 128),
    ],
)
@pytest.mark.parametrize("make", [tiny_pruned, tiny_model])
def test_the_context_ends_where_the_file_is_exact(make, name, changes, longest, tmp_path):
    """The architectures know no sliding window, and no queries that grow with the position, as Ministral 3's do."""
    write(make(name, vocab_size=VOCABULARY, **changes), TOKENIZER, tmp_path)
    fields = GGUFReader(tmp_path / "model-f16.gguf").fields
    assert fields[f"{fields['general.architecture'].contents()}.context_length"].contents() == longest


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        *((name, {}, "no architecture for pruned .*qwen2, qwen3, seed_oss") for name in ("gemma", "olmo2", "smollm3")),
        ("llama", {"hidden_act": "gelu"}, "silu in such models, not gelu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}, "hold dynamic"),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0]}},
            "hold longrope",
        ),
        ("qwen3", {}, "output head is not the embedding"),
        ("qwen3", {**TIED, "attention_bias": True}, "no biases in the attention"),
        ("qwen3", {**TIED, "rope_parameters": YARN}, "Qwen3 cannot hold yarn"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(name, changes, says, tmp_path):
    with pytest.raises(UnsupportedArchitectureError, match=says):
        write(tiny_pruned(name, **changes), TOKENIZER, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of each case's file, with what llama.cpp computed from it, the model, and PyTorch's steps."""
    pytest.importorskip("xllamacpp")
    made = {}
    for case, make in PAIRS:
        directory, model = tmp_path_factory.mktemp("gguf"), built(make, case)
        write(model, TOKENIZER, directory, dtype="f32")
        made[case, make] = directory, model, greedy(model)
        asked = {"ids": [ids for ids, _ in made[case, make][2]], "never": NEVER}
        (directory / "asked.json").write_text(json.dumps(asked))
    done = run_python(RUN, *(directory for directory, *_ in made.values()))
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@pytest.mark.parametrize(("case", "make"), PAIRS)
def test_24_greedy_tokens_are_those_of_pytorch(case, make, runs):
    directory, model, steps = runs[case, make]
    assert (directory / "found.json").is_file(), "llama.cpp cannot load the file, or aborted"
    for (_, expected), found in zip(steps, json.loads((directory / "found.json").read_text()), strict=True):
        assert found["id"] == likeliest(expected)
        assert max(abs(expected[each["id"]].item() - each["logprob"]) for each in found["top_logprobs"]) <= 1e-4
    row, widths = WRITABLE[CONFIGS[case.split()[0]].model_type], shape_of(model.config).dense.layers
    fields = GGUFReader(directory / "model-f32.gguf").fields
    architecture = fields["general.architecture"].contents()
    assert architecture == (row.by_layer if make is tiny_pruned else row.equal)
    if make is tiny_pruned:
        assert len({w.num_key_value_heads for w in widths}) > 1
        groups, channels = (
            fields[f"{architecture}.{key}"].contents() for key in ("attention.head_count_kv", "feed_forward_length")
        )
        assert groups == [w.num_key_value_heads for w in widths]
        assert channels == [w.intermediate_size for w in widths]
