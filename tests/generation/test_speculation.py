"""When drafts are tried: by counts alone."""

from typing import Any

import pytest

from spmd_infer.errors import TaskError
from spmd_infer.generation.speculation import Pace, PromptLookup


def steps(pace: Pace, count: int, *, rows: int, accepted: int) -> list[bool]:
    """What it says before each step, when every step that tries drafts has so many right ones."""
    said = []
    for _ in range(count):
        said.append(pace.wants(rows))
        if said[-1]:
            pace.observe(rows, accepted)
    return said


def test_goes_on_while_drafts_are_right() -> None:
    assert all(steps(Pace(4, free_rows=8), 500, rows=8, accepted=24))


def test_rests_twice_as_long_after_each_trial_that_fails() -> None:
    said = "".join(" x"[each] for each in steps(Pace(4, free_rows=8, window=8), 200, rows=8, accepted=0))
    assert [len(rest) for rest in said.rstrip().split("x") if rest][:3] == [16, 32, 64]
    assert said.count("x") <= 5


def test_a_text_that_begins_to_repeat_itself_is_tried_again_and_kept() -> None:
    pace = Pace(4, free_rows=8, window=8)
    steps(pace, 20, rows=4, accepted=0)
    assert all(steps(pace, 400, rows=4, accepted=12)[-300:])
    said = steps(pace, 60, rows=4, accepted=0)  # and the rests are short again
    assert said.count(False) < 60
    assert True in said[said.index(False) + 16 : said.index(False) + 18]


def test_the_longer_the_step_grows_the_more_must_be_right() -> None:
    pace = Pace(4, free_rows=8)
    assert pace.break_even(1) == pytest.approx(4 / 9)
    assert pace.break_even(32) == pytest.approx(3.2)
    assert Pace(4, free_rows=256).break_even(32) < 0.5
    assert Pace(4, free_rows=8, draft_cost=1.0).break_even(1) == pytest.approx(1 + 4 / 9)


def test_large_steps_are_not_tried() -> None:
    pace = Pace(4, free_rows=8)
    assert steps(pace, 50, rows=25, accepted=100) == [False] * 50
    assert pace.wants(23)


def test_without_adapting_all_steps_try_drafts() -> None:
    assert all(steps(Pace(4, free_rows=8, adaptive=False), 200, rows=8, accepted=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "1 to 16 drafts, got k=0"),
        ({"k": 17}, "got k=17"),
        ({"longest": 1}, "shortest=2 and longest=1"),
        ({"shortest": 0}, "shortest=0"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        PromptLookup(**options)
