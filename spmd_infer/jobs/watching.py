"""Progress of all ranks, read from what they write: a thread on rank 0."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from spmd_infer.jobs.log import LogReader

EVERY_S = 1.0


@contextmanager
def watched(logs: list[Path], costs: Mapping[int, int], advance: Callable[[int], None]) -> Iterator[None]:
    """Advance by the cost of every unit that a rank finishes, until the block ends.

    Args:
        logs: the files that the ranks of this run write; they need not exist yet.
        costs: of each unit.
        advance: called from a thread of its own.
    """
    readers = [LogReader(path, check=False) for path in logs]
    over = threading.Event()

    def look() -> None:
        finished = [place.done.unit for reader in readers for _, place in reader.records() if place is not None]
        if finished:
            advance(sum(costs.get(unit, 0) for unit in finished))

    def watch() -> None:
        while not over.wait(EVERY_S):
            look()

    thread = threading.Thread(target=watch, name="spmd-infer batch progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()
