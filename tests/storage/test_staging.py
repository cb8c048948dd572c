"""What is saved is there whole or not at all, and a place that cannot be written is found out first."""

import contextlib
import errno
import os
import signal
import sys
from pathlib import Path

import pytest

from selfpruner_hub import interrupts
from selfpruner_hub.errors import OutputError
from selfpruner_hub.storage import staging
from selfpruner_hub.storage.staging import (
    check_replaceable,
    check_writable,
    output_path,
    save_directory,
    write_atomically,
)

needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a /proc that nobody can write")


def tree(directory):
    """Every file under `directory` with its content, and every folder."""
    paths = sorted(directory.rglob("*"))
    return {str(p.relative_to(directory)): p.read_text() if p.is_file() else None for p in paths}


def save(directory, failure=None, **files):
    with save_directory(directory) as staging:
        for name, content in files.items():
            (staging / name).write_text(content)
        if failure:
            raise failure


def test_a_new_directory_appears_whole(tmp_path):
    target = tmp_path / "deep" / "model"
    with save_directory(target) as staging:
        (staging / "a").write_text("1")
        (staging / "b").write_text("2")
        assert not target.exists()
        assert staging.parent == target.parent  # a rename stays on one file system
    assert tree(tmp_path) == {"deep": None, "deep/model": None, "deep/model/a": "1", "deep/model/b": "2"}


def test_modes_are_those_of_public_files(tmp_path):
    with save_directory(tmp_path / "model") as staging:
        (staging / "a").write_text("1")
        (staging / "a").chmod(0o600)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("failure", [RuntimeError("mine"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("before", [{}, {"a": "old"}], ids=["new", "existing"])
def test_an_exception_inside_changes_nothing(before, failure, tmp_path):
    if before:
        save(tmp_path / "model", **before)
    was = tree(tmp_path)
    with pytest.raises(type(failure)):
        save(tmp_path / "model", failure, a="new")
    assert tree(tmp_path) == was


def test_a_full_disk_is_an_output_error_and_changes_nothing(tmp_path):
    save(tmp_path / "model", a="old")
    was = tree(tmp_path)
    with pytest.raises(OutputError, match="No space left") as caught:
        save(tmp_path / "model", OSError(28, "No space left on device"), a="new")
    assert caught.value.hint
    assert tree(tmp_path) == was


def test_files_of_the_same_names_are_replaced_and_others_stay(tmp_path):
    save(tmp_path / "model", a="old", c="mine")
    (tmp_path / "model" / "d").mkdir()
    (tmp_path / "model" / "d" / "x").write_text("old")
    with save_directory(tmp_path / "model") as staging:
        (staging / "a").write_text("new")
        (staging / "b").write_text("new")
        (staging / "d").mkdir()
        (staging / "d" / "y").write_text("new")
    assert tree(tmp_path / "model") == {"a": "new", "b": "new", "c": "mine", "d": None, "d/y": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


OLD = {"a": "old", "b": None, "b/x": "old", "c": "mine", "e": "old", "f-1": "stale"}
NEW = {"a": "new", "b": None, "b/y": "new", "c": "mine", "d": "new", "e": "old"}
RENAMES = 6
"""Of an overwrite: two old entries and a stale one leave, three new ones come."""


def overwrite(directory):
    """Save `a`, `b` and `d` over a directory that has `a`, `b` and others."""
    (directory / "b").mkdir(parents=True)
    for name, content in OLD.items():
        if content:
            (directory / name).write_text(content)
    with save_directory(directory, stale=["d", "f-*"]) as staging:
        (staging / "b").mkdir()
        for name in ("a", "b/y", "d"):
            (staging / name).write_text("new")


def at_rename(monkeypatch, number, act, after):
    """Do something before or after a rename, counted from 1; the list that is given back holds all renames."""
    rename, renamed = Path.rename, []

    def counted(path, target):
        renamed.append(path)
        if len(renamed) != number:
            return rename(path, target)
        if not after:
            act()
        found = rename(path, target)
        act()
        return found

    monkeypatch.setattr(Path, "rename", counted)
    return renamed


def raising(failure):
    def act():
        raise failure

    return act


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(
    ("failure", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(5, "Input/output error"), OutputError)]
)
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_an_overwrite_that_is_interrupted_between_renames_changes_nothing(
    number, failure, raised, after, tmp_path, monkeypatch
):
    at_rename(monkeypatch, number, raising(failure), after)
    with pytest.raises(raised):
        overwrite(tmp_path / "model")
    assert tree(tmp_path / "model") == OLD
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("number", range(1, RENAMES + 1))
def test_an_overwrite_that_is_killed_leaves_no_old_file_beside_a_new_one(number, tmp_path, monkeypatch):
    """What it leaves may be incomplete; the old files are whole in a hidden folder inside of it."""
    renamed = at_rename(monkeypatch, number, lambda: os._exit(9), after=True)
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            overwrite(tmp_path / "model")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not renamed  # of this process
    left = tree(tmp_path / "model")
    replaced = {left[name] for name in ("a", "b/x", "b/y", "d") if name in left}
    assert replaced in (set(), {"old"}, {"new"})
    (retired,) = [tree(p) for p in (tmp_path / "model").glob(".*") if "old" in tree(p).values()]
    assert {**{name: left[name] for name in OLD if name in left}, **retired} == OLD


def test_an_overwrite_takes_as_many_renames_as_are_tried(tmp_path, monkeypatch):
    renamed = at_rename(monkeypatch, 0, raising(AssertionError()), after=False)
    overwrite(tmp_path / "model")
    assert tree(tmp_path / "model") == NEW
    assert len(renamed) == RENAMES


@pytest.mark.parametrize("link", [False, True], ids=["mount point", "link to another disk"])
def test_a_directory_on_a_file_system_of_its_own(link, tmp_path, monkeypatch):
    model, rename = tmp_path / "model", Path.rename
    model.mkdir()

    def within_file_systems(path, target):
        if path.is_relative_to(model) != Path(target).is_relative_to(model):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", within_file_systems)
    output = tmp_path / "link" if link else model
    if link:
        output.symlink_to(model)
    for text in ("old", "new"):
        check_writable(output)
        save(output, a=text)
        assert tree(model) == {"a": text}
    assert output.is_symlink() == link


def test_a_link_to_a_directory_that_is_not_there_yet(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "model")
    save(tmp_path / "link", a="new")
    assert tree(tmp_path / "deep") == {"model": None, "model/a": "new"}
    assert (tmp_path / "link").is_symlink()


TRACED = {file.__file__ for file in (staging, interrupts, contextlib)}


def interrupted_at(moment, work):
    """Do work that Ctrl-C interrupts at a line of it, counted from 1; return whether it has as many lines."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == moment:
                signal.raise_signal(signal.SIGINT)
        return trace if frame.f_code.co_filename in TRACED else None

    before = sys.gettrace()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C
    try:
        sys.settrace(trace)
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
        after = signal.signal(signal.SIGINT, handler)
    assert after is signal.default_int_handler
    return lines >= moment


@pytest.mark.parametrize("before", [{}, {"a": "old", "f-1": "stale", "mine": "mine"}], ids=["new", "existing"])
def test_an_interrupt_at_any_moment_of_a_save_leaves_nothing_beside_it(before, tmp_path):
    moment, after = 0, {"a": "new", **{name: text for name, text in before.items() if name == "mine"}}
    found = []

    def work():
        with save_directory(directory / "model", stale=["f-*"]) as place:
            (place / "a").write_text("new")

    for moment in range(1, 1000):
        directory = tmp_path / str(moment)
        directory.mkdir()
        if before:
            save(directory / "model", **before)
        if not interrupted_at(moment, work):
            break
        assert {p.name for p in directory.iterdir()} <= {"model"}
        found.append(tree(directory / "model"))
        assert found[-1] in (before, after)
    assert before in found
    assert after in found
    assert 50 < moment < 999


@pytest.mark.parametrize("given", ["", " ", Path("a"), "a"], ids=repr)
def test_an_empty_output_is_refused(given):
    if str(given).strip():
        assert output_path(given) == Path("a")
        return
    with pytest.raises(OutputError, match="has no name") as caught:
        output_path(given)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("files", "overwrite", "fine"),
    [
        (["config.json"], False, False),
        (["config.json"], True, True),
        (["config.json", "record.json"], False, True),
        (["notes.txt"], False, True),
        ([], False, True),
    ],
)
def test_a_model_of_the_users_own_is_not_replaced_unasked(files, overwrite, fine, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    if fine:
        check_replaceable(tmp_path, "record.json", overwrite)
        return
    with pytest.raises(OutputError, match="holds another model") as caught:
        check_replaceable(tmp_path, "record.json", overwrite)
    assert "--overwrite" in caught.value.hint


@pytest.mark.parametrize("name", ["file", "file/model", "file/deep/model"])
@pytest.mark.parametrize("check", [check_writable, save], ids=["check", "save"])
def test_a_file_is_in_the_way(check, name, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError) as caught:
        check(tmp_path / name)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file": "mine"}


@needs_proc
@pytest.mark.parametrize("check", [check_writable, save], ids=["check", "save"])
@pytest.mark.parametrize("name", ["/proc/model", "/proc/deep/model"])
def test_a_parent_that_cannot_be_created(check, name):
    with pytest.raises(OutputError, match=f"Cannot write '{name}'"):
        check(Path(name))


@pytest.mark.parametrize("check", [check_writable, save], ids=["check", "save"])
def test_a_name_that_is_too_long(check, tmp_path):
    with pytest.raises(OutputError, match="too long"):
        check(tmp_path / ("x" * 300))
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("name", [".", "model", "deep/deeper/model"])
def test_check_writable_leaves_nothing_behind(name, tmp_path):
    check_writable(tmp_path / name)
    assert tree(tmp_path) == {}


def test_write_atomically_creates_and_replaces(tmp_path):
    path = tmp_path / "new" / "a.json"
    for text in ("old", "β"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("failure", "raised"), [(OSError(28, "No space left"), OutputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failure_in_the_middle_leaves_the_old_file_alone(failure, raised, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, "old")

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(raised):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write") as caught:
        write_atomically(tmp_path / "file" / "a.json", "text")
    assert caught.value.hint
