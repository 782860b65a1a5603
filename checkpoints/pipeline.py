"""Work in a few threads at a time, within a budget of bytes, with acts in between that keep the order of the calls."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType

_MOST_WORKERS = 4


def workers() -> int:
    """How many threads checkpoints are read, digested and written with: one more than cores, as one may be waiting."""
    return min(_MOST_WORKERS, (os.cpu_count() or 1) + 1)


class Pipeline:
    """Runs work in threads and acts in the calling thread, each act once all work given before it is done.

    The threads are its own rather than a ``ThreadPoolExecutor``'s: those take nothing more once the interpreter has
    begun to exit, while a save in the background still has to end then.

    Args:
        budget_bytes: how many bytes may be under way; a piece of work that takes more runs while nothing else does.
        what: what the threads are called.

    Leaving the context waits for everything. An error of any work is raised by the next call or on leaving; work that
    has not begun is then dropped.
    """

    def __init__(self, budget_bytes: int, what: str = "checkpoint") -> None:
        self._budget = budget_bytes
        self._taken = 0
        self._failed = False
        self._queue: deque[tuple[Future[None], int] | Callable[[], None]] = deque()
        self._waiting: SimpleQueue[tuple[Future[None], Callable[[], None]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=f"{what}-{i}") for i in range(workers())]
        for thread in self._threads:
            thread.start()

    def run(self, nbytes: int, work: Callable[[], None]) -> None:
        """Have a thread do something that takes that many bytes of memory; waits while the budget is taken."""
        self._settle(until=self._budget - nbytes)
        self._taken += nbytes
        future: Future[None] = Future()
        self._queue.append((future, nbytes))
        self._waiting.put((future, work))

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

    def _serve(self) -> None:
        while (item := self._waiting.get()) is not None:
            future, work = item
            if self._failed:
                future.cancel()
            if future.set_running_or_notify_cancel():
                try:
                    work()
                except BaseException as error:  # raised again where the result is asked for
                    self._failed = True
                    future.set_exception(error)
                else:
                    future.set_result(None)
            del future, work, item

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._settle(until=-1)
        finally:
            for entry in self._queue:
                if not callable(entry):
                    entry[0].cancel()
            self._queue.clear()
            for _ in self._threads:
                self._waiting.put(None)
            for thread in self._threads:
                thread.join()
