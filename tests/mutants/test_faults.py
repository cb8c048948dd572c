"""The list of faults is current, and the runner says which test notices one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from mutants.run import ROOT, WITHOUT, Fault, Trial, faults, named, tried

FAULTS = faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.what}")
def test_every_fault_can_be_put_in(fault):
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    assert fault.put_in(text) != text
    assert all((ROOT / name.partition("::")[0]).is_file() for name in fault.tests)


def test_every_fault_has_a_name_of_its_own():
    assert len({(fault.file, fault.what) for fault in FAULTS}) == len(FAULTS)


def test_files_are_named_by_a_part_of_their_path():
    assert {fault.file for fault in named(["budget", "journal"], FAULTS)} == {
        "selfpruner_hub/plans/budget.py",
        "selfpruner_hub/search/journal.py",
        "selfpruner_hub/search/journal_lines.py",
    }
    assert list(named([], FAULTS)) == FAULTS
    with pytest.raises(SystemExit, match="No file with faults has '--help' in its path"):
        list(named(["budget", "--help"], FAULTS))


def test_the_tests_run_without_the_plugins_that_the_runner_leaves_out():
    """It leaves out xdist, which knows hooks of tests/conftest.py."""
    without = (word for name in WITHOUT for word in ("-p", f"no:{name}"))
    command = [sys.executable, "-m", "pytest", *without, "--collect-only", "-q", "tests/plans/test_plan.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:]


TWICE = Fault("twice.py", "twice is thrice", "2 * x", "3 * x", ("test_twice.py",), "")


@pytest.mark.parametrize("text", ["def twice(x): return x + x\n", "2 * x, 2 * x\n"])
def test_a_text_that_is_gone_or_not_alone_ends_the_run(text):
    with pytest.raises(
        SystemExit, match=r"twice\.py has the text of the fault 'twice is thrice' (0|2) times, not once"
    ):
        TWICE.put_in(text)


def test_the_runner_tells_what_is_noticed(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "twice.py").write_text("def twice(x): return 2 * x  # a comment\n")
    (copy / "test_twice.py").write_text(
        "from twice import twice\ndef test_of_nothing(): twice(0)\ndef test_of_one(): assert twice(1) == 2\n"
    )
    unnoticed = replace(TWICE, what="another comment", old="a comment", new="none")
    told = dict(tried([TWICE, unnoticed], Trial(copy, tmp_path / "log"), {}))
    assert told == {TWICE: "test_twice.py::test_of_one", unnoticed: ""}
    assert "return 2 * x  # a comment" in (copy / "twice.py").read_text()

    (copy / "twice.py").write_text("def twice(x): return 4 + 2 * x\n")
    with pytest.raises(SystemExit, match=r"test_twice\.py::test_of_one fails without any fault\."):
        list(tried([TWICE], Trial(copy, tmp_path / "log"), {}))
