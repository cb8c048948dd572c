"""Progress bars: one for each piece of work, also where the same work is done twice."""

from selfpruner_hub.progress import Bars


def last_frames(printed: str) -> list[str]:
    """The last state of each bar."""
    return [line.split("\r")[-1].strip() for line in printed.split("\n") if line.strip()]


def test_the_same_work_again_gets_a_bar_of_its_own(capsys):
    with Bars() as bars:
        for total in (200, 106):  # the parent answers, and then the pruned model answers what the parent could
            for done in (0, total // 2, total):
                bars("answering questions", done, total)
    first, second = last_frames(capsys.readouterr().err)
    assert "200/200" in first
    assert "106/106" in second


def test_a_total_that_grows_stays_one_bar(capsys):
    with Bars() as bars:
        bars("pruning", 1, 2)
        bars("pruning", 2, 4)
    (only,) = last_frames(capsys.readouterr().err)
    assert "50%" in only.replace(" ", "")


def test_disabled_bars_print_nothing(capsys):
    with Bars(enabled=False) as bars:
        bars("pruning", 1, 2)
        bars.say("done")
    assert not capsys.readouterr().err
