"""What the package does when it is imported: little, and the Auto classes know its models all the same."""

import json
import subprocess
import sys
from importlib import import_module

import pytest
from support.processes import run_python

import selfpruner_hub

LOAD = """
import sys, torch
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "selfpruner_hub.models.modeling_selfpruned", type(model)
"""
# All ask for one name: transformers itself fails where several threads import different parts of it for the first time.
THREADS = """
import threading, selfpruner_hub
errors, threading.excepthook = [], lambda raised: errors.append(raised)
threads = [threading.Thread(target=getattr, args=[selfpruner_hub, "PrunedModel"]) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
from transformers import AutoModelForCausalLM
"""


def in_a_process(code, *words):
    done = run_python(code, *words)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.heavy
@pytest.mark.parametrize(
    "first",
    [
        "from selfpruner_hub import PrunedModel\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nfrom selfpruner_hub import PrunedModel",
        "import transformers\nfrom selfpruner_hub import AutoPruner\nfrom transformers import AutoModelForCausalLM",
        THREADS,
    ],
    ids=["ours first", "transformers first", "between", "threads"],
)
def test_auto_classes_load_pruned_models_without_remote_code(first, saved_models):
    in_a_process(first + LOAD, saved_models / "first")


@pytest.mark.heavy
def test_the_package_itself_imports_nothing_that_is_slow():
    code = "import selfpruner_hub, sys, json\nprint(json.dumps([dir(selfpruner_hub), list(sys.modules)]))"
    names, modules = json.loads(subprocess.check_output([sys.executable, "-c", code]))
    assert {"AutoPruner", "PrunedModel"} <= set(names)
    assert not {"torch", "transformers", "numpy"} & set(modules)


def test_public_names():
    assert selfpruner_hub.AutoPruner is import_module("selfpruner_hub.pruner").AutoPruner
    assert selfpruner_hub.PrunedModel is import_module("selfpruner_hub.pruned_model").PrunedModel
    with pytest.raises(AttributeError, match="module 'selfpruner_hub' has no attribute 'Pruner'"):
        selfpruner_hub.Pruner  # noqa: B018
