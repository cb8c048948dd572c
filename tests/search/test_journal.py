"""The journal survives a crash at any byte, and refuses what is not its own."""

import json

import pytest

from selfpruner_hub.errors import OutputError, RunMismatchError
from selfpruner_hub.search.journal import Journal, read_journal

SETTINGS = {"beta": 0.3, "seed": 0, "seeds": ("uniform", "ramp"), "data": {"name": "wikitext2"}}
RECORDS = [
    {"kind": "ask", "replies": [{"reply": 'é 漢 "\n\u2028\u0085', "rates": None}]},
    {"kind": "score", "fitness": 0.1 + 0.2},
]


@pytest.fixture
def journal(tmp_path):
    """A journal with two records, on disk."""
    journal = Journal(tmp_path, SETTINGS)
    for record in RECORDS:
        journal.append(record)
    return journal


def test_records_come_back_as_they_were(journal, tmp_path):
    again = Journal(tmp_path, SETTINGS)
    assert again.records == journal.records
    assert again.records[0] == {"kind": "header", "schema_version": 1, "settings": json.loads(json.dumps(SETTINGS))}
    assert again.records[1:] == RECORDS
    assert read_journal(again.path) == again.records


def test_a_record_is_on_disk_as_soon_as_it_is_appended(tmp_path):
    journal = Journal(tmp_path / "new" / "run", SETTINGS)
    for count, record in enumerate(RECORDS, 2):
        journal.append(record)
        assert len(journal.path.read_bytes().splitlines()) == count
    assert journal.text() == journal.path.read_text(encoding="utf-8")


def test_without_a_directory_records_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, SETTINGS)
    journal.append(RECORDS[0])
    assert journal.records[1:] == RECORDS[:1]
    assert [json.loads(line) for line in journal.text().strip().split("\n")] == journal.records
    assert not list(tmp_path.iterdir())


def test_a_record_changed_afterwards_does_not_change_the_journal():
    journal, record = Journal(None, {}), {"kind": "ask", "replies": []}
    journal.append(record)
    record["replies"].append("later")
    assert journal.records[1] == {"kind": "ask", "replies": []}


def test_a_journal_cut_at_any_byte_loses_its_torn_line_only(journal, tmp_path):
    whole = journal.path.read_bytes()
    for cut in range(len(whole)):
        journal.path.write_bytes(whole[:cut])
        again = Journal(tmp_path, SETTINGS)
        complete = whole[:cut].count(b"\n")
        assert again.records == journal.records[: max(complete, 1)]  # the header is written anew
        again.append({"kind": "score", "fitness": 1})
        assert Journal(tmp_path, SETTINGS).records == [*again.records[:-1], {"kind": "score", "fitness": 1}]


def test_reading_passes_over_a_torn_line_and_leaves_the_file_alone(journal):
    torn = journal.path.read_bytes()[:-3]
    journal.path.write_bytes(torn)
    assert read_journal(journal.path) == journal.records[:-1]
    assert journal.path.read_bytes() == torn


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"beta": 0.4}, r"beta: 0\.3 there, 0\.4 here"),
        ({"seeds": ("uniform",)}, r"seeds: \['uniform', 'ramp'\] there, \['uniform'\] here"),
        ({"extra": 1}, "extra: None there, 1 here"),
        ({"data": {"name": "c4"}}, "data: .*wikitext2.* there, .*c4.* here"),
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


@pytest.mark.parametrize("damage", [b"", b"{", b"prose", b"\x00\x00", b"\xff\xfe\xfd", b"[1]", b"7", b"null"])
@pytest.mark.parametrize("line", [0, 1])
def test_a_damaged_line_before_the_last_is_refused(journal, tmp_path, damage, line):
    lines = journal.path.read_bytes().split(b"\n")
    lines[line] = damage
    journal.path.write_bytes(b"\n".join(lines))
    before = journal.path.read_bytes()
    for open_it in (lambda: Journal(tmp_path, SETTINGS), lambda: read_journal(journal.path)):
        with pytest.raises(RunMismatchError, match="damaged at line|not the journal"):
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


def test_a_record_that_cannot_be_written_is_not_kept(journal):
    journal.path.unlink()
    journal.path.mkdir()
    with pytest.raises(OutputError, match=r"Cannot write .*search\.jsonl"):
        journal.append({"kind": "score", "fitness": 1})
    assert journal.records[1:] == RECORDS


# A bug once: half a surrogate pair (an emoji that a token limit cut in two) ends in a UnicodeEncodeError.
def test_a_lone_surrogate_in_a_reply_is_written(journal, tmp_path):
    record = {"kind": "ask", "replies": [{"reply": "\ud83d"}]}
    journal.append(record)
    assert Journal(tmp_path, SETTINGS).records[-1] == record
