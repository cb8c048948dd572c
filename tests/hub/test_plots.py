"""Pictures are drawn from a journal, and say so where there is nothing to draw."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from support.tiny import tiny_model, tiny_tokenizer

from selfpruner_hub.cli import main
from selfpruner_hub.pruner import AutoPruner


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    AutoPruner(tiny_model("llama"), tiny_tokenizer(), "tests/llama").prune(
        0.3, data="self", proposer="evolution", window=32, calibration_tokens=1024, fitness_tokens=256,
        evaluations=9, run_dir=directory, progress=False,
    )  # fmt: skip
    return directory


def test_three_pictures_in_two_formats(run_dir, tmp_path, capsys):
    assert main(["plot", str(run_dir), "--output", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == sorted(f"{n}.{k}" for n in ("search", "population", "rates") for k in ("png", "svg"))
    assert capsys.readouterr().out.count("\n") == 6
    for path in (tmp_path / "plots").glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors()) > 10  # something is drawn


def test_a_directory_without_a_journal(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "holds no search.jsonl" in capsys.readouterr().err


def test_a_journal_without_scores(run_dir, tmp_path, capsys):
    (tmp_path / "search.jsonl").write_text((run_dir / "search.jsonl").read_text().splitlines()[0] + "\n")
    assert main(["plot", str(tmp_path)]) == 2
    assert "no complete score" in capsys.readouterr().err


def test_a_journal_in_which_no_score_is_finite(run_dir, tmp_path, capsys):
    lines = map(json.loads, (run_dir / "search.jsonl").read_text().splitlines())
    infinite = [line | {"fitness": None} if line["kind"] == "score" else line for line in lines]
    (tmp_path / "search.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in infinite))
    assert main(["plot", str(tmp_path)]) == 2
    assert "no complete score" in capsys.readouterr().err
