"""Work in threads within a budget: order kept, bytes bounded, errors told, nothing left running."""

import threading
import time
from functools import partial

import pytest

from spmd_infer.checkpoints.pipeline import Pipeline, workers


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("test-line")]


def test_acts_come_in_order_once_their_work_is_done() -> None:
    done: list[int] = []
    acted: list[tuple[int, bool]] = []

    def work(number: int) -> None:
        time.sleep(0.001 * (number % 3))
        done.append(number)

    def act(number: int) -> None:
        acted.append((number, number in done))

    with Pipeline(1 << 20, "test-line") as line:
        for number in range(20):
            line.run(1, partial(work, number))
            line.then(partial(act, number))
    assert acted == [(number, True) for number in range(20)]
    assert running() == []


def test_no_more_than_the_budget_is_under_way() -> None:
    lock, taken, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal taken, most
        with lock:
            taken += 40
            most = max(most, taken)
        time.sleep(0.002)
        with lock:
            taken -= 40

    with Pipeline(100, "test-line") as line:
        for _ in range(30):
            line.run(40, work)
    assert 40 <= most <= 80
    with Pipeline(10, "test-line") as line:  # more than the budget: alone
        most = 0
        for _ in range(5):
            line.run(40, work)
    assert most == 40


def test_an_error_is_raised_and_the_rest_is_dropped() -> None:
    begun: list[int] = []
    acted: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        time.sleep(0.001)
        if number == 3:
            raise KeyError("three")

    def many() -> None:
        with Pipeline(1 << 20, "test-line") as line:
            for number in range(200):
                line.run(1, partial(work, number))
                line.then(partial(acted.append, number))

    with pytest.raises(KeyError, match="three"):
        many()
    assert acted == [0, 1, 2]
    # While number 3 is at work, every other thread ends what it has, and may begin one more.
    assert len(begun) <= 4 + 2 * (workers() - 1)
    assert running() == []


def test_leaving_with_an_error_waits_for_what_runs() -> None:
    ended = threading.Event()

    def work() -> None:
        time.sleep(0.05)
        ended.set()

    def outside() -> None:
        with Pipeline(1 << 20, "test-line") as line:
            line.run(1, work)
            time.sleep(0.01)
            raise ValueError("outside")

    with pytest.raises(ValueError, match="outside"):
        outside()
    assert ended.is_set()
    assert running() == []
