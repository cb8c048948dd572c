"""The journal survives a crash at any byte, and refuses what is not its own."""

import json
import logging
import math
import os

import pytest

from selfpruner_hub.errors import OutputError, RunMismatchError
from selfpruner_hub.plans.budget import Budget, Rates
from selfpruner_hub.plans.plan import ModelShape, Plan
from selfpruner_hub.plans.predicted_loss import StepEffects
from selfpruner_hub.search.journal import Journal, read_journal
from selfpruner_hub.search.journal_lines import AskLine, CheckLine, ProbeLine, Reply, RoundLine, ScoreLine, SeedsLine
from selfpruner_hub.search.proposers import Proposal

SETTINGS = {"beta": 0.3, "seed": 0, "seeds": ("uniform", "ramp"), "data": {"name": "wikitext2"}} | {
    "model": "m", "fitness": "kl", "shape": {
        "hidden_size": 8, "head_dim": 4, "queries_per_group": 1, "intermediate_size": [8, 16],
        "num_key_value_heads": [2, 1],
    },
}  # fmt: skip
PLAN = Plan.of([8, 16], [2, 1])
LINES = [
    ScoreLine(0, "seed:ramp", 0.25, 0.1 + 0.2, PLAN, 0.5),
    ScoreLine(0, "seed:ramp", 1.0, math.inf, PLAN, 2.0),
    ProbeLine(1, 1.25, StepEffects((0.5, math.inf), (-0.25, 0.0), (0.125, 1.0), (math.inf, -1e-06)), PLAN, 3.0),
    AskLine(
        round=1,
        attempt=0,
        operation="crossover",
        proposer="self",
        random_state=(3, 1, 0),
        replies=(
            Reply(Proposal(Rates((0.0, 0.5), (0.5, 0.0)), (0, 2), "p", "r", tokens=7), PLAN, 0.000123),
            Reply(Proposal(None, prompt="p", reply='é 漢 "\n\u2028\u0085', error="no", tokens=5)),
        ),
        seconds=0.25,
    ),
    RoundLine(1, "crossover", {"accepted": 1, "refused": 1}, 0.000123, math.inf, "seed:ramp", 2.5, 12),
    RoundLine(2, "mutation", {}, None, 0.3, "self", 4.0, 12),
    SeedsLine({"uniform": Rates((0.0, 0.5), (0.5, 0.1 + 0.2))}),
    CheckLine(0.25, PLAN, 1.5),
]
FILE = r"""{"kind": "header", "schema_version": 1, "versions": {}, "settings": {"beta": 0.3, "seed": 0, "seeds": ["uniform", "ramp"], "data": {"name": "wikitext2"}, "model": "m", "fitness": "kl", "shape": {"hidden_size": 8, "head_dim": 4, "queries_per_group": 1, "intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}}}
{"kind": "score", "round": 0, "origin": "seed:ramp", "share": 0.25, "fitness": 0.30000000000000004, "widths": {"intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}, "seconds": 0.5}
{"kind": "score", "round": 0, "origin": "seed:ramp", "share": 1.0, "fitness": null, "widths": {"intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}, "seconds": 2.0}
{"kind": "probe", "round": 1, "share": 1.25, "slopes": {"attention_removed": [0.5, null], "attention_restored": [-0.25, 0.0], "ffn_removed": [0.125, 1.0], "ffn_restored": [null, -1e-06]}, "widths": {"intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}, "seconds": 3.0}
{"kind": "ask", "round": 1, "attempt": 0, "operation": "crossover", "proposer": "self", "random_state": [3, 1, 0], "replies": [{"rates": {"attention": [0.0, 0.5], "ffn": [0.5, 0.0]}, "parents": [0, 2], "prompt": "p", "reply": "r", "error": "", "tokens": 7, "widths": {"intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}, "moved": 0.000123}, {"rates": null, "parents": [], "prompt": "p", "reply": "\u00e9 \u6f22 \"\n\u2028\u0085", "error": "no", "tokens": 5}], "seconds": 0.25}
{"kind": "round", "round": 1, "operation": "crossover", "counts": {"accepted": 1, "refused": 1}, "moved": 0.000123, "best": null, "origin": "seed:ramp", "spent": 2.5, "tokens": 12}
{"kind": "round", "round": 2, "operation": "mutation", "counts": {}, "moved": null, "best": 0.3, "origin": "self", "spent": 4.0, "tokens": 12}
{"kind": "seeds", "rates": {"uniform": {"attention": [0.0, 0.5], "ffn": [0.5, 0.30000000000000004]}}}
{"kind": "check", "fitness": 0.25, "widths": {"intermediate_size": [8, 16], "num_key_value_heads": [2, 1]}, "seconds": 1.5}
"""  # noqa: E501
"""The same lines as files of earlier versions have them."""


@pytest.fixture
def journal(tmp_path):
    """A journal with a line or two of every kind, on disk."""
    journal = Journal(tmp_path, SETTINGS)
    for line in LINES:
        journal.append(line)
    return journal


def test_lines_come_back_as_they_were(journal, tmp_path):
    again = Journal(tmp_path, SETTINGS)
    assert again.lines == journal.lines == LINES
    assert read_journal(again.path) == (json.loads(json.dumps(SETTINGS)), LINES)


def test_the_format_of_the_file_is_the_one_that_old_journals_have(journal, tmp_path):
    assert journal.path.read_text(encoding="ascii") == journal.text() == FILE
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "search.jsonl").write_text(FILE, encoding="ascii")
    old = Journal(tmp_path / "old", SETTINGS)
    assert (old.lines, old.text()) == (LINES, FILE)


def test_a_line_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    journal = Journal(tmp_path / "new" / "run", SETTINGS)
    for count, line in enumerate(LINES, 2):
        journal.append(line)
        assert len(journal.path.read_bytes().splitlines()) == count
    assert journal.text() == journal.path.read_text(encoding="utf-8")


def test_without_a_directory_lines_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, SETTINGS)
    journal.append(LINES[0])
    assert journal.lines == LINES[:1]
    assert journal.text() == "".join(FILE.splitlines(keepends=True)[:2])
    assert not list(tmp_path.iterdir())


def test_what_is_appended_is_what_a_resumed_search_reads():
    counts, journal = {"accepted": 1}, Journal(None, {})
    line = journal.append(RoundLine(1, "mutation", counts, None, 0.5, "self", 2.0, 0))
    counts["accepted"] = 2
    assert journal.lines == [line] == [RoundLine(1, "mutation", {"accepted": 1}, None, 0.5, "self", 2.0, 0)]
    rounded = journal.append(ProbeLine(1, 1.25, StepEffects((1 / 3,), (0.0,), (0.0,), (0.0,)), PLAN, 3.0))
    assert rounded.slopes.attention_removed == (0.333333,)


def test_a_journal_cut_at_any_byte_loses_its_torn_line_only(journal, tmp_path):
    whole = journal.path.read_bytes()
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        again = Journal(tmp_path, SETTINGS)
        complete = whole[:cut].count(b"\n")
        assert again.lines == LINES[: max(complete - 1, 0)]  # without one, the header is written anew
        again.append(LINES[0])
        assert Journal(tmp_path, SETTINGS).lines == again.lines


def test_reading_passes_over_a_torn_line_and_leaves_the_file_alone(journal):
    torn = journal.path.read_bytes()[:-3]
    journal.path.write_bytes(torn)
    assert read_journal(journal.path)[1] == LINES[:-1]
    assert journal.path.read_bytes() == torn


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta": 0.4}, r"beta: 0\.3 there, 0\.4 here"),
        ({"seeds": ("uniform",)}, r"seeds: \['uniform', 'ramp'\] there, \['uniform'\] here"),
        ({"extra": 1}, "extra: None there, 1 here"),
        ({"data": {"name": "c4"}}, "data.name: 'wikitext2' there, 'c4' here"),
    ],
)
def test_other_settings_are_refused_with_their_difference(journal, tmp_path, changes, named):
    before = journal.path.read_bytes()
    with pytest.raises(RunMismatchError, match=named) as caught:
        Journal(tmp_path, SETTINGS | changes)
    assert "\n" not in str(caught.value)
    assert journal.path.read_bytes() == before


def test_a_setting_that_went_away_is_named(journal, tmp_path):
    with pytest.raises(RunMismatchError, match="seed: 0 there, None here"):
        Journal(tmp_path, {key: value for key, value in SETTINGS.items() if key != "seed"})


@pytest.mark.parametrize(
    "first", [b'{"kind": "header", "schema_version": 2, "settings": {}}', b'{"kind": "score"}', b"{}"]
)
def test_a_foreign_header_is_refused(tmp_path, first):
    (tmp_path / "search.jsonl").write_bytes(first + b"\n")
    with pytest.raises(RunMismatchError, match="another search"):
        Journal(tmp_path, SETTINGS)


@pytest.mark.parametrize("damage", [b"", b"{", b"prose", b"\x00\x00", b"\xff\xfe\xfd", b"[1]", b"7", b"null", b"{}"])
@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_line_before_the_last_is_refused(journal, tmp_path, damage, line):
    lines = journal.path.read_bytes().split(b"\n")
    lines[line] = damage
    journal.path.write_bytes(b"\n".join(lines))
    before = journal.path.read_bytes()
    for open_it in (lambda: Journal(tmp_path, SETTINGS), lambda: read_journal(journal.path)):
        with pytest.raises(RunMismatchError, match="damaged at line|not the journal|another"):
            open_it()
    assert journal.path.read_bytes() == before


def test_reading_what_is_no_journal_is_refused(tmp_path):
    missing, other = tmp_path / "missing.jsonl", tmp_path / "other.jsonl"
    other.write_text('{"kind": "score"}\n')
    for path in (missing, other):
        with pytest.raises(RunMismatchError, match="not the journal"):
            read_journal(path)


def test_a_directory_under_a_regular_file_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for directory in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OutputError, match="Cannot use the run directory"):
            Journal(directory, SETTINGS)


def test_a_directory_in_place_of_the_file_cannot_be_used(tmp_path):
    (tmp_path / "search.jsonl").mkdir()
    with pytest.raises(OutputError, match="Cannot use the run directory"):
        Journal(tmp_path, SETTINGS)


def test_a_line_that_cannot_be_written_is_not_kept(journal):
    journal.path.unlink()
    journal.path.mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*search\.jsonl"):
        journal.append(LINES[0])
    assert journal.lines == LINES
    assert journal.text() == FILE


# A bug once: half a surrogate pair (an emoji that a token limit cut in two) ends in a UnicodeEncodeError.
def test_a_lone_surrogate_in_a_reply_is_written(journal, tmp_path):
    line = AskLine(3, 0, "initial", "self", (3, 3, 0), (Reply(Proposal(None, reply="\ud83d")),), 0.0)
    journal.append(line)
    assert Journal(tmp_path, SETTINGS).lines[-1] == line


@pytest.mark.parametrize(
    "changed",
    [
        lambda line: line | {"kind": "unknown"},
        lambda line: {key: value for key, value in line.items() if key != "widths"},
        lambda line: line | {"widths": [1, 2]},
        lambda line: line | {"fitness": "low"},
    ],
    ids=["kind", "missing key", "other shape", "other type"],
)
def test_a_line_of_another_form_is_damage(changed, journal, tmp_path):
    lines = journal.path.read_text(encoding="ascii").splitlines()
    lines[1] = json.dumps(changed(json.loads(lines[1])))
    journal.path.write_text("\n".join(lines) + "\n", encoding="ascii")
    for open_it in (lambda: Journal(tmp_path, SETTINGS), lambda: read_journal(journal.path)):
        with pytest.raises(RunMismatchError, match="damaged at line 2"):
            open_it()


def test_a_line_is_flushed_to_the_disk(tmp_path, monkeypatch):
    """For the case that the machine stops, not only the process."""
    flushed = []
    monkeypatch.setattr("os.fsync", lambda file: flushed.append(os.fstat(file).st_size))
    journal = Journal(tmp_path, SETTINGS)
    journal.append(LINES[0])
    sizes = [len(line) + 1 for line in journal.text().splitlines()]
    assert flushed == [sizes[0], sum(sizes)]


def test_another_version_of_a_library_is_warned_of(tmp_path, caplog):
    """The search goes on all the same."""
    Journal(tmp_path, SETTINGS, {"torch": "2.13", "transformers": "5.24"}).append(LINES[0])
    with caplog.at_level(logging.WARNING, "selfpruner_hub"):
        assert Journal(tmp_path, SETTINGS, {"torch": "2.13", "transformers": "5.24"}).lines == LINES[:1]
        assert caplog.records == []
        assert Journal(tmp_path, SETTINGS, {"torch": "2.14", "transformers": "5.24"}).lines == LINES[:1]
    (said,) = (record.getMessage() for record in caplog.records)
    assert "was begun with other versions: torch 2.13, now 2.14." in said


OTHERS = {
    "wider than the model": Plan.of([9, 16], [2, 1]),
    "of another number of layers": Plan.of([8], [2]),
    "off the budget": PLAN,
}


@pytest.mark.parametrize("plan", OTHERS.values(), ids=OTHERS)
def test_plans_of_another_search_are_damage(plan, tmp_path):
    journal = Journal(tmp_path, SETTINGS)
    budget = Budget(ModelShape(8, 4, 1, Plan.of([8, 16], [2, 1])), 0.3)
    kept = budget.project(Rates((0.0, 0.0), (0.5, 0.5)))
    for line in (ScoreLine(0, "self", 1.0, 0.5, kept, 1.0), CheckLine(0.25, kept, 1.0)):
        journal.append(line)
    journal.check_plans(budget)
    reply = Reply(Proposal(Rates((0.0, 0.0), (0.0, 0.0))), plan, 0.0)
    journal.append(AskLine(1, 0, "crossover", "self", (0, 1, 0), (reply,), 1.0))
    with pytest.raises(RunMismatchError, match=r"search\.jsonl is damaged at line 4"):
        journal.check_plans(budget)


def test_effects_are_of_every_layer(tmp_path):
    budget = Budget(ModelShape(8, 4, 1, Plan.of([8, 16], [2, 1])), 0.3)
    journal = Journal(tmp_path, SETTINGS)
    effects = StepEffects(*((0.5,),) * 4)
    journal.append(ProbeLine(1, 1.25, effects, budget.project(Rates((0.0, 0.0), (0.5, 0.5))), 3.0))
    with pytest.raises(RunMismatchError, match=r"search\.jsonl is damaged at line 2"):
        journal.check_plans(budget)
