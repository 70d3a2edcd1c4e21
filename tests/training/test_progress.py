"""Long work says how far it is, not more often than asked, and what it has left."""

from __future__ import annotations

from training.progress import Progress, duration


def test_lines_come_no_more_often_than_asked_and_none_at_the_end() -> None:
    lines: list[str] = []
    often, seldom = Progress("drawing", lines.append, every=0), Progress("caching", lines.append)
    for done in range(1, 5):
        often(done, 4)
        seldom(done, 4)
    assert [line.split(",")[0] for line in lines] == ["drawing 1/4", "drawing 2/4", "drawing 3/4"]
    assert all(line.endswith(" left") for line in lines)


def test_time_left_follows_what_was_done() -> None:
    lines: list[str] = []
    progress = Progress("drawing", lines.append, every=0)
    progress.began -= 100  # a hundred seconds for one of four
    progress(1, 4)
    assert lines == ["drawing 1/4, 5 min left"]
    assert [duration(seconds) for seconds in (0.4, 89, 91, 5399, 5401)] == ["0 s", "89 s", "2 min", "90 min", "1.5 h"]
