"""Installed from its files alone: the sdist makes the wheel, and the wheel has all that a user calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from support.tiny import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.heavy]
ROOT = Path(__file__).parents[1]
SPACE = """
import pathlib, sys
from selfpruner_hub.hub.space import space_files
from selfpruner_hub.storage.model_record import read_record
for name, source in space_files(read_record(pathlib.Path(sys.argv[1])), "me/tiny").items():
    path = pathlib.Path(sys.argv[2]) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
"""
PAGE = """
import answers, app, record_tables, selfpruner_hub
*_, last = answers.answer("pruned", "a b c", 4)
print(last.tokens, len(record_tables.scored(record_tables.journal())), selfpruner_hub.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that is built from the unpacked sdist."""
    sdist, wheels = (pytest.importorskip(f"hatchling.builders.{kind}") for kind in ("sdist", "wheel"))
    folder = tmp_path_factory.mktemp("built")
    packed = next(sdist.SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"]))
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")
    unpacked = packed.removesuffix(".tar.gz")
    return Path(next(wheels.WheelBuilder(unpacked).build(directory=str(folder), versions=["standard"])))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A function that runs a program of an environment that has the wheel; the dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", "--no-compile", str(wheel)], check=True)
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    (Path(paths["purelib"]) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])

    def run(program, *words, cwd, **environment):
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        made = subprocess.run(
            [folder / "bin" / program, *map(str, words)],
            cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        return made.stdout

    return run


def test_the_wheel_of_the_sdist_is_that_of_the_checkout(wheel, tmp_path):
    wheels = pytest.importorskip("hatchling.builders.wheel")
    other = next(wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    contents = [
        {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}
        for archive in map(zipfile.ZipFile, (wheel, other))
    ]
    assert contents[0] == contents[1]


def test_help_prune_and_the_space_work_from_the_wheel(installed, tmp_path):
    assert "prune" in installed("selfpruner", "--help", cwd=tmp_path)
    dense, pruned, space = save_tiny("llama", tmp_path / "dense"), tmp_path / "pruned", tmp_path / "space"
    few = {"window": 32, "calibration_tokens": 512, "fitness_tokens": 128}
    settings = [word for name, value in few.items() for word in ("--set", f"{name}={value}")]
    words = ["--beta", "0.3", "--output", pruned, "--data", "self", "--proposer", "evolution", "--evaluations", "3"]
    said = json.loads(installed("selfpruner", "prune", dense, *words, *settings, "--json", cwd=tmp_path))
    assert said["beta"] == 0.3
    assert (pruned / "README.md").is_file()  # from the template of cards

    pytest.importorskip("gradio", reason='needs pip install -e ".[space]"')
    installed("python", "-c", SPACE, pruned, space, cwd=tmp_path)
    shown = {"PRUNED_MODEL": str(pruned), "DENSE_MODEL": str(dense)}
    tokens, scores, package = installed("python", "-c", PAGE, cwd=space, **shown).split()
    assert int(tokens) > 0
    assert int(scores) > 0
    assert Path(package) == space / "selfpruner_hub" / "__init__.py"  # the copy that the Space carries
