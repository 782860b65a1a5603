"""How many pages the pool is to have: more and fewer with what is asked for, since attention reads all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spmd_infer.errors import TaskError
from spmd_infer.generation.executor import Executor
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_HOST_CACHE_BYTES = 4 << 30
_DEVICE_MEMORY_SHARE = 0.85


class PoolRoom:
    """Keeps count of the pages that requests may come to hold.

    Args:
        engine: on whose devices the pool lies.
        executor: holds the pool.
        scheduler: gives out its pages.
        cache_bytes: of the largest pool; None for what ``GenerationOptions`` says.

    Attributes:
        most_pages: of each part in the largest pool.
    """

    def __init__(self, engine: Engine, executor: Executor, scheduler: Scheduler, cache_bytes: int | None) -> None:
        self._executor, self._scheduler = executor, scheduler
        allowed = _bytes_on(engine) if cache_bytes is None else cache_bytes
        self.most_pages = max(1, allowed // executor.page_bytes // scheduler.limits.parts)
        self._wanted = 0
        self._own: dict[str, int] = {}  # pages of each request

    def fitting(self, sequence: Sequence, copies: int) -> int:
        """Pages that the pool is to have for requests about to be added, in each part.

        Args:
            sequence: the first of them.
            copies: how many there are.

        Raises:
            TaskError: the largest pool is too small for the sequence alone.
        """
        own = self._pages(sequence)
        if own > self.most_pages:
            raise self.too_long(sequence, self.most_pages)
        parts, waiting = self._scheduler.limits.parts, len(self._own) + copies
        running = min(waiting, parts * self._scheduler.limits.slots)
        # The mean of all, for as many as run at a time, and one page to spare for each part.
        wanted = (self._wanted + own * copies) * running // waiting // parts + 1
        pages = self._executor.sizes.pool(max(own, wanted), self.most_pages)
        current = self._executor.num_pages
        # Not smaller while others wait: the largest of them may need what the mean does not.
        return pages if pages > current or (4 * pages <= current and not self._own) else current

    def compiled(self) -> int:
        """Pages that the pool is to have after a warm-up: no fewer than now, and programs are compiled for so many."""
        return self._executor.sizes.pool(self._executor.num_pages, self.most_pages)

    def taken(self, request_id: str, sequence: Sequence) -> None:
        """Count a request that has been added, whose sequence is one like this."""
        self._own[request_id] = self._pages(sequence)
        self._wanted += self._own[request_id]

    def left(self, request_id: str) -> None:
        """Count it out."""
        self._wanted -= self._own.pop(request_id)

    def too_long(self, sequence: Sequence, pages: int) -> TaskError:
        """What is wrong with a sequence that does not fit so many pages."""
        return TaskError(
            f"prompt of {sequence.prompt_len} tokens + max_tokens {sequence.max_tokens} may take "
            f"{self._pages(sequence)} pages of {PAGE_SIZE} positions; the cache has room for {pages} "
            f"({pages * self._executor.page_bytes / 1e9:.2f} GB); raise cache_bytes or shorten it"
        )

    def _pages(self, sequence: Sequence) -> int:
        """That it may come to hold."""
        return -(-self._scheduler.limits.reach(sequence.prompt_len + sequence.max_tokens) // PAGE_SIZE)


def _bytes_on(engine: Engine) -> int:
    free = []
    for device in engine.mesh.local_devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            free.append(int(stats["bytes_limit"] * _DEVICE_MEMORY_SHARE) - int(stats.get("bytes_in_use", 0)))
    return max(0, min(free)) * len(free) if free else _HOST_CACHE_BYTES
