"""How long a dispatched computation takes, in bounded time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def median_seconds(call: Callable[[], Any], budget: float, *, least: int = 3, most: int = 50) -> float:
    """The median time of a call until its result is there, after one call that compiles.

    Args:
        call: returns arrays that may still be being computed.
        budget: seconds after which no further call begins.
        least: calls that are timed whatever the budget.
        most: calls at most.
    """
    jax.block_until_ready(call())
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while len(seconds) < least or (len(seconds) < most and time.perf_counter() < end):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)
