"""Processes that are forked from one that has torch are fresh in all else."""

from __future__ import annotations

import json
import signal

from support.processes import run_python

TOLD = "import sys, os, json; print(json.dumps([sys.argv, dict(os.environ), os.getcwd(), list(sys.modules)]))"


def test_it_has_torch_and_nothing_of_hugging_face_or_of_ours(tmp_path):
    done = run_python(TOLD, "a word", 3, env={"ONLY": "this"}, cwd=tmp_path)
    argv, variables, folder, modules = json.loads(done.stdout)
    assert (argv, variables, folder) == (["-c", "a word", "3"], {"ONLY": "this"}, str(tmp_path))
    packages = {name.partition(".")[0] for name in modules}
    assert "torch" in packages
    assert not packages & {"transformers", "huggingface_hub", "accelerate", "selfpruner_hub", "exporters"}


def test_how_it_ends_is_told():
    said = run_python("import sys\nprint('said')\nprint('wrong', file=sys.stderr)\nsys.exit(3)")
    assert (said.returncode, said.stdout, said.stderr) == (3, "said\n", "wrong\n")
    raised = run_python("raise ValueError('this')")
    assert raised.returncode == 1
    assert raised.stderr.endswith("ValueError: this\n")
    assert run_python("import os; os.abort()").returncode == -signal.SIGABRT


def test_a_module_runs_as_a_program():
    assert run_python("-m", "json.tool", "--help").stdout.startswith("usage: ")
