"""What the package does when it is imported: little, and the Auto classes know its models all the same."""

import importlib.util
import json
import subprocess
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader

import pytest
from support.processes import run_python

import selfpruner_hub
from selfpruner_hub.import_hook import after_import

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
        "import selfpruner_hub\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport selfpruner_hub",
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


@pytest.fixture
def package(tmp_path, monkeypatch, request):
    """The name of a package that nobody has imported."""
    name = f"package_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text("value = 1\nspec_at_import = __spec__.loader\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_what_follows_an_import_is_called_once_after_it(package):
    calls = []
    after_import(package, lambda: calls.append(("first", sys.modules[package].value)))
    after_import(package, lambda: calls.append(("second", sys.modules[package].value)))
    assert importlib.util.find_spec(package).origin.endswith(f"{package}.py")  # to look is not to import
    assert calls == []
    module = import_module(package)
    assert calls == [("first", 1), ("second", 1)]
    assert isinstance(module.spec_at_import, SourceFileLoader)  # the package sees its own loader
    assert module.__loader__ is module.__spec__.loader is module.spec_at_import
    importlib.reload(module)
    assert len(calls) == 2
    after_import(package, lambda: calls.append("at once"))
    assert calls[2:] == ["at once"]


def test_a_package_that_is_missing_stays_missing():
    after_import("no_such_package_of_ours", lambda: pytest.fail("it is not there"))
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_ours"):
        import_module("no_such_package_of_ours")


def test_an_error_of_what_follows_is_an_error_of_the_import(package):
    def fail():
        raise RuntimeError("registration failed")

    after_import(package, fail)
    with pytest.raises(RuntimeError, match="registration failed"):
        import_module(package)
    assert package not in sys.modules
