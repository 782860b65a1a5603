"""Work in a few threads at a time, within a budget of bytes, with acts in between that keep the order of the calls."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_MOST_WORKERS = 4


def workers() -> int:
    """How many threads checkpoints are read, digested and written with."""
    return max(1, min(_MOST_WORKERS, os.cpu_count() or 1))


class Pipeline:
    """Runs work in threads and acts in the calling thread, each act once all work given before it is done.

    Args:
        budget_bytes: how many bytes may be under way; a piece of work that takes more runs while nothing else does.
        what: what the threads are called.

    Leaving the context waits for everything. An error of any work is raised by the next call or on leaving; work that
    has not begun is then dropped.
    """

    def __init__(self, budget_bytes: int, what: str = "checkpoint") -> None:
        self._budget = budget_bytes
        self._taken = 0
        self._queue: deque[tuple[Future[None], int] | Callable[[], None]] = deque()
        self._pool = ThreadPoolExecutor(workers(), thread_name_prefix=what)

    def run(self, nbytes: int, work: Callable[[], None]) -> None:
        """Have a thread do something that takes that many bytes of memory; waits while the budget is taken."""
        self._settle(until=self._budget - nbytes)
        self._taken += nbytes
        self._queue.append((self._pool.submit(work), nbytes))

    def then(self, act: Callable[[], None]) -> None:
        """Do something in the calling thread, once all work given so far is done."""
        self._queue.append(act)

    def _settle(self, until: int) -> None:
        """Take what is done from the front of the queue, and wait for more until so few bytes are under way."""
        while self._queue:
            first = self._queue[0]
            if not callable(first):
                future, nbytes = first
                if self._taken <= until and not future.done():
                    return
                future.result()
                self._taken -= nbytes
                self._queue.popleft()
            else:
                self._queue.popleft()
                first()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle(until=-1)
        finally:
            self._queue.clear()
            self._pool.shutdown(wait=True, cancel_futures=True)
