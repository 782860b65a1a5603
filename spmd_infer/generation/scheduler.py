"""Which sequences compute what in each step. Pure Python: no JAX, no clock, no randomness.

Two schedulers that see the same calls with the same arguments make the same plans, so that every process of a
multi-host job can run its own.

**Order.** Sequences run in the order of their ranks: arrival number + priority × ``Limits.overtaking``. Inside a
priority this is first come, first served; a request of a better priority overtakes at most so many earlier ones for
each level, so that none waits for ever. The queue is strict: when its first sequence does not fit, none behind it is
tried.

**Pages.** A sequence takes the pages of its whole prompt when it is admitted, and one more whenever decoding fills the
last. When there is none, the running sequence of the highest rank in that part is preempted: its prompt becomes all its
tokens so far, and it queues again at its old rank once the tokens on the way have come. The sequence of the lowest rank
is never preempted, and its pages fit the pool, so that there is always progress.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Many

from spmd_infer.errors import TaskError
from spmd_infer.generation.limits import Limits
from spmd_infer.generation.parts import Part
from spmd_infer.generation.sequences import Sequence, SequenceId, State
from spmd_infer.generation.step_plan import StepPlan
from spmd_infer.generation.step_planner import StepPlanner
from spmd_infer.generation.waiting import WaitingQueue


class Scheduler:
    """Admits sequences, plans steps, accepts tokens.

    Each round is ``plan``, dispatch of the plan, then ``accept`` of the tokens of an *earlier* step, and ``finish`` of
    the sequences that these ended. Any number of plans may be dispatched before their tokens are accepted.

    Args:
        limits: sizes and rules.

    Attributes:
        limits: the same.
        parts: the data shards, each with its pool and tables.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.parts = tuple(Part(index, limits) for index in range(limits.parts))
        self._num_pages = limits.num_pages
        self._sequences: dict[SequenceId, Sequence] = {}
        self._waiting = WaitingQueue()
        self._planner = StepPlanner(limits, self.parts, self._waiting)
        self._shrunk = False
        self._arrivals = 0
        self._forks = 0

    def __len__(self) -> int:
        return len(self._sequences)

    def __contains__(self, id: object) -> bool:  # noqa: A002  # as everywhere here
        return id in self._sequences

    def __getitem__(self, id: SequenceId) -> Sequence:  # noqa: A002
        return self._sequences[id]

    @property
    def ids(self) -> list[SequenceId]:
        """Of all sequences that have not ended, in the order in which they came."""
        return list(self._sequences)

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return self._num_pages

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with a slot."""
        return sum(len(part.running) for part in self.parts)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            TaskError: it can never run, or its id is taken.
        """
        limits = self.limits
        if sequence.id in self._sequences:
            raise TaskError(f"a sequence {sequence.id!r} is running or waiting already")
        if sequence.prompt_len < 1 or sequence.max_tokens < 1:
            raise TaskError(
                "a sequence needs at least one token of prompt and one to add, "
                f"got {sequence.prompt_len} and max_tokens={sequence.max_tokens}"
            )
        positions = sequence.prompt_len + sequence.max_tokens
        if positions > limits.context_len:
            raise TaskError(
                f"prompt of {sequence.prompt_len} tokens + max_tokens {sequence.max_tokens} = {positions}, "
                f"more than the {limits.context_len} positions of a sequence"
            )
        sequence.reach = limits.reach(positions)
        if (pages := limits.pages_for(sequence.reach)) > self._num_pages:
            raise TaskError(
                f"prompt of {sequence.prompt_len} tokens + max_tokens {sequence.max_tokens} may take {pages} pages of "
                f"{limits.page_size} positions; the cache has {self._num_pages}"
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        sequence.rank = (sequence.arrival + sequence.priority * limits.overtaking, sequence.arrival, 0)
        self._sequences[sequence.id] = sequence
        self._waiting.push(sequence)

    def fork(self, id: SequenceId, child: SequenceId, extra: Iterable[int] = ()) -> Sequence:  # noqa: A002
        """Continue a sequence's accepted tokens in a second way as well.

        The child ranks right after its parent. It shares the parent's full pages and copies the last if both are in one
        part when it is admitted; otherwise it computes what the prefix cache does not have. It waits until the parent's
        prompt is computed. Its first chunk is its last token in the usual case.

        Args:
            id: the parent.
            child: the new sequence's id.
            extra: tokens that the child has beyond the parent's: its choice of a beam.

        Raises:
            TaskError: there is no such parent, the child's id is taken, or the child has no token left to add.
        """
        if (parent := self._sequences.get(id)) is None:
            raise TaskError(f"no sequence {id!r} to fork")
        if child in self._sequences:
            raise TaskError(f"a sequence {child!r} is running or waiting already")
        sequence = Sequence(
            child,
            parent.tokens,
            parent.max_tokens,
            priority=parent.priority,
            deadline=parent.deadline,
            namespace=parent.namespace,
        )
        sequence.tokens += extra
        sequence.prompt_len = parent.prompt_len
        if sequence.outputs >= sequence.max_tokens:
            raise TaskError(f"a fork with {sequence.outputs} of at most {sequence.max_tokens} tokens has none to add")
        self._forks += 1
        sequence.reach = parent.reach
        sequence.arrival = parent.arrival
        sequence.rank = (*parent.rank[:2], self._forks)
        sequence.digests = parent.digests[: len(parent.tokens) // self.limits.page_size]
        sequence.parent = parent
        sequence.common = len(parent.tokens)
        self._sequences[child] = sequence
        if parent.state is State.DECODE:
            self._release(sequence)
        else:
            sequence.state = State.HELD
            parent.children.append(sequence)
        return sequence

    def accept(self, id: SequenceId, tokens: Many[int]) -> bool:  # noqa: A002
        """Take the tokens that a sequence's earliest unread step has brought.

        Args:
            id: the sequence; one that has ended is passed over.
            tokens: one, or up to ``lookahead`` more.

        Returns:
            Whether the sequence has taken them.

        Raises:
            TaskError: no step of it is unread, or the step cannot have brought so many.
        """
        sequence = self._sequences.get(id)
        if sequence is None:
            return False
        if not sequence.flights:
            raise TaskError(f"all steps of sequence {id!r} have been read")
        width = sequence.flights[0]
        if not 1 <= len(tokens) <= width:
            raise TaskError(f"the step of sequence {id!r} brings 1 to {width} tokens, got {len(tokens)}")
        sequence.flights.popleft()
        sequence.in_flight -= width
        sequence.tokens += tokens
        if sequence.state is State.DRAINING:
            if not sequence.flights and sequence.outputs < sequence.max_tokens:
                self._waiting.push(sequence)
            return True
        sequence.computed -= width - len(tokens)
        # Not the last token: if it ends the sequence, the devices may leave out the step that would compute it.
        if (len(sequence.tokens) - 1) // self.limits.page_size > sequence.registered:
            self.parts[sequence.part].register(sequence, len(sequence.tokens) - 1)
        return True

    def finish(self, id: SequenceId) -> Sequence | None:  # noqa: A002
        """End a sequence in any state. Slot and pages are free at once: what is dispatched runs before what follows.

        Returns:
            The sequence, or None where there is none.
        """
        sequence = self._sequences.pop(id, None)
        if sequence is None:
            return None
        if sequence.state is State.WAITING:
            sequence.state = State.ENDED
            self._waiting.left()
        elif sequence.state is State.HELD:
            assert sequence.parent is not None
            sequence.parent.children.remove(sequence)
        elif sequence.slot is not None:
            self._planner.vacate(sequence)
        sequence.state = State.ENDED
        sequence.parent = None
        self._release_children(sequence)
        return sequence

    cancel = finish
    """The same: a cancelled sequence's tokens on the way are passed over by ``accept``."""

    def plan(self, now: float) -> StepPlan:
        """What to dispatch next.

        Args:
            now: seconds, on the clock of the deadlines.
        """
        plan = StepPlan()
        if self._shrunk:
            plan.rejected.extend(
                s for s in self._sequences.values() if self.limits.pages_for(s.reach) > self._num_pages
            )
            for sequence in plan.rejected:
                self.finish(sequence.id)
            self._shrunk = False
        while (overdue := self._waiting.overdue(now)) is not None:
            self.finish(overdue.id)
            plan.expired.append(overdue)
        self._planner.fill(plan)
        for chunk in plan.prefills:
            if chunk.last:
                self._release_children(chunk.sequence)
        return plan

    def restart(self) -> None:
        """Begin again after a step that failed, so that nobody knows what the devices hold.

        Sequences keep the tokens that were accepted and queue at their old ranks; steps on the way count as never
        planned, and no page holds anything.
        """
        for sequence in self._sequences.values():
            sequence.slot, sequence.pages, sequence.room = None, [], 0
            sequence.computed = sequence.ahead = sequence.in_flight = sequence.registered = 0
            sequence.flights.clear()
            if sequence.state is State.HELD:
                continue
            sequence.parent = None
            if sequence.state is not State.WAITING:
                self._waiting.push(sequence)
        self._planner.restart()

    def resize(self, num_pages: int) -> list[tuple[int, int, int]]:
        """Grow or shrink every part's pool, between steps. The next plan rejects the sequences that fit no longer.

        Returns:
            Pages to move, ``(part, source, destination)``, before the next step.

        Raises:
            TaskError: the running sequences need more; nothing has changed then.
        """
        needed = max((self.limits.pages_for(s.reach) for part in self.parts for s in part.running), default=1)
        needed = max(needed, *(part.pool.used for part in self.parts))
        if num_pages < needed:
            raise TaskError(f"a pool of {num_pages} pages is too small: running sequences need {needed}")
        self._num_pages = num_pages
        self._shrunk = True
        return [(part.index, *move) for part in self.parts for move in part.resize(num_pages)]

    def _release_children(self, sequence: Sequence) -> None:
        for child in sequence.children:
            self._release(child)
        sequence.children.clear()

    def _release(self, child: Sequence) -> None:
        """Queue a fork, whose parent decodes or has ended."""
        assert child.parent is not None
        child.common = min(child.common, child.parent.computed)
        child.started = child.parent.started
        self._waiting.push(child)
