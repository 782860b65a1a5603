"""The queue of sequences that wait for a slot: by rank, and by deadline."""

from __future__ import annotations

import heapq
from itertools import count

from spmd_infer.generation.sequences import Sequence, State

# Entries of sequences that have left stay until they come up, but never more than this beyond as many as wait.
_MOST_STALE = 64


class WaitingQueue:
    """Sequences in state ``WAITING``. Whoever takes one out sets its state and calls ``left``."""

    def __init__(self) -> None:
        self._size = 0
        self._serial = count()
        self._by_rank: list[tuple[tuple[int, int, int], Sequence]] = []
        self._by_deadline: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return self._size

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait."""
        sequence.state = State.WAITING
        self._size += 1
        heapq.heappush(self._by_rank, (sequence.rank, sequence))
        if sequence.deadline is not None and not sequence.started:
            heapq.heappush(self._by_deadline, (sequence.deadline, next(self._serial), sequence))

    def left(self) -> None:
        """Note that one sequence waits no longer."""
        self._size -= 1
        if len(self._by_rank) > 2 * self._size + _MOST_STALE:
            self._by_rank = [entry for entry in self._by_rank if entry[1].state is State.WAITING]
            heapq.heapify(self._by_rank)
        if len(self._by_deadline) > 2 * self._size + _MOST_STALE:
            self._by_deadline = [entry for entry in self._by_deadline if _may_expire(entry[2])]
            heapq.heapify(self._by_deadline)

    def first(self) -> Sequence | None:
        """The sequence of the lowest rank; it stays."""
        while self._by_rank:
            sequence = self._by_rank[0][1]
            if sequence.state is State.WAITING:
                return sequence
            heapq.heappop(self._by_rank)
        return None

    def overdue(self, now: float) -> Sequence | None:
        """A sequence that has not started and whose deadline has come, the earliest first; it stays."""
        while self._by_deadline:
            deadline, _, sequence = self._by_deadline[0]
            if _may_expire(sequence):
                return sequence if deadline <= now else None
            if deadline > now:
                return None
            heapq.heappop(self._by_deadline)
        return None


def _may_expire(sequence: Sequence) -> bool:
    return sequence.state is State.WAITING and not sequence.started
