"""Random requests, cancellations, forks and pool sizes, run on a simulated device.

Whatever happens, every sequence says what it would have said alone, pages are counted exactly, each step keeps its
budget, and everything comes to an end.
"""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from spmd_infer.errors import TaskError
from spmd_infer.generation.limits import Limits
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence, State
from spmd_infer.generation.step_plan import StepPlan
from tests.generation.simulated_device import SimulatedDevice, expected, outputs_of

CONTEXT = 40

limits_of = st.builds(
    Limits,
    parts=st.sampled_from([1, 2, 3]),
    slots=st.integers(1, 4),
    num_pages=st.integers(6, 16),
    page_size=st.sampled_from([2, 4]),
    context_len=st.just(CONTEXT),
    token_budget=st.integers(16, 40),
    max_chunk=st.sampled_from([4, 8, 64]),
    chunked=st.booleans(),
    lookahead=st.sampled_from([0, 0, 2]),
    prefix_cache=st.sampled_from([True, True, False]),
    overtaking=st.sampled_from([0, 3, 100]),
    max_copies=st.sampled_from([0, 1, 5, 64]),
    salt=st.just(b"secret"),
)


class SchedulerOnDevice(RuleBasedStateMachine):
    """The scheduler and a device that is up to three steps ahead of what the host has read."""

    @initialize(limits=limits_of, ahead=st.integers(0, 3))
    def start(self, limits: Limits, ahead: int) -> None:
        self.limits = limits
        self.ahead = ahead
        self.scheduler = Scheduler(limits)
        self.device = SimulatedDevice(self.scheduler)
        self.now = 0.0
        self.num_pages = limits.num_pages
        self.names = 0
        self.all: list[Sequence] = []
        self.cancelled: set[int | str] = set()
        self.dropped: set[int | str] = set()
        self.alone: dict[int | str, list[int]] = {}  # what each would say alone
        self.history: list[StepPlan] = []

    def name(self) -> int:
        self.names += 1
        return self.names

    @rule(
        prefix=st.integers(0, 2),
        prefix_len=st.integers(0, 20),
        tail=st.lists(st.integers(0, 2), min_size=1, max_size=8),
        max_tokens=st.integers(1, 12),
        priority=st.integers(-1, 2),
        wait=st.none() | st.integers(0, 20),
        namespace=st.sampled_from(["", "", "adapter"]),
    )
    def add(
        self,
        prefix: int,
        prefix_len: int,
        tail: list[int],
        max_tokens: int,
        priority: int,
        wait: int | None,
        namespace: str,
    ) -> None:
        prompt = [prefix] * prefix_len + tail
        deadline = None if wait is None else self.now + wait
        sequence = Sequence(self.name(), prompt, max_tokens, priority=priority, deadline=deadline, namespace=namespace)
        positions = len(prompt) + max_tokens - 1 + 2 * self.limits.lookahead
        if -(-positions // self.limits.page_size) > self.num_pages:
            with pytest.raises(TaskError, match=f"the cache has {self.num_pages}"):
                self.scheduler.add(sequence)
            return
        self.scheduler.add(sequence)
        self.all.append(sequence)
        self.alone[sequence.id] = expected(prompt, namespace, max_tokens)

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data(), extra=st.lists(st.integers(0, 2), max_size=2))
    def fork(self, data: st.DataObject, extra: list[int]) -> None:
        parent = self.scheduler[data.draw(st.sampled_from(sorted(self.scheduler.ids, key=str)))]
        name = self.name()
        if parent.outputs + len(extra) >= parent.max_tokens:
            with pytest.raises(TaskError, match="has none to add"):
                self.scheduler.fork(parent.id, name, extra)
            return
        child = self.scheduler.fork(parent.id, name, extra)
        self.all.append(child)
        said = child.tokens[child.prompt_len :]
        rest = expected(child.tokens, child.namespace, child.max_tokens - len(said))
        self.alone[name] = said + rest

    @precondition(lambda self: len(self.scheduler))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.scheduler.ids, key=str)))
        sequence = self.scheduler.cancel(name)
        assert sequence is not None
        assert sequence.state is State.ENDED
        assert sequence.slot is None
        assert not sequence.pages
        self.cancelled.add(name)

    @rule(passed=st.sampled_from([0, 1, 1, 1, 5]))
    def step(self, passed: int) -> None:
        self.now += passed
        self.last_part = {sequence.id: sequence.part for part in self.scheduler.parts for sequence in part.running}
        plan = self.scheduler.plan(self.now)
        self.check_plan(plan)
        self.device.dispatch(plan)
        while len(self.device.unread) > self.ahead:
            self.device.read()

    @precondition(lambda self: self.device.unread)
    @rule()
    def read(self) -> None:
        self.device.read()

    @rule(num_pages=st.integers(4, 20))
    def resize(self, num_pages: int) -> None:
        try:
            moves = self.scheduler.resize(num_pages)
        except TaskError:
            return
        self.num_pages = num_pages
        self.device.move(moves)

    def check_plan(self, plan: StepPlan) -> None:
        limits = self.limits
        self.dropped.update(sequence.id for sequence in plan.expired + plan.rejected)
        for sequence in plan.expired:
            assert sequence.deadline is not None
            assert sequence.deadline <= self.now
            assert not sequence.started
        for part in self.scheduler.parts:
            chunks = [chunk for chunk in plan.prefills if chunk.sequence.part == part.index]
            decodes = [sequence for sequence in plan.decodes if sequence.part == part.index]
            tokens = sum(chunk.length for chunk in chunks) + limits.width * len(decodes)
            assert tokens <= limits.token_budget or (not limits.chunked and len(chunks) == 1)
            assert not chunks or part.index not in {self.last_part[sequence.id] for sequence in plan.preempted}
            for chunk in chunks:
                assert chunk.length > 0
                assert chunk.last == (chunk.start + chunk.length == chunk.sequence.target)
                if limits.chunked:
                    assert chunk.length <= limits.max_chunk
                    assert chunk.last or (chunk.start + chunk.length) % limits.page_size == 0
            # Everybody whose prompt was computed before decodes, unless its last tokens are on the way.
            in_chunks = {chunk.sequence.id for chunk in chunks}
            planned = {sequence.id for sequence in decodes}
            for sequence in part.running:
                if sequence.state is State.DECODE and sequence.id not in in_chunks | planned:
                    assert sequence.computed + limits.width > sequence.reach or (
                        sequence.outputs + len(sequence.flights) >= sequence.max_tokens
                    )
            assert len([1 for number, *_ in plan.copies if number == part.index]) <= limits.max_copies

    @invariant()
    def everything_is_counted(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for part in self.scheduler.parts:
            part.pool.check()
            assert part.pool.num_pages == self.num_pages
            counts = dict[int, int]()
            for sequence in part.running:
                assert sequence.slot is not None
                assert sequence.part == part.index
                assert len(set(sequence.pages)) == len(sequence.pages)
                assert sequence.room == len(sequence.pages) * self.limits.page_size
                assert sequence.computed <= max(sequence.room, 1)
                for page in sequence.pages:
                    counts[page] = counts.get(page, 0) + 1
                row = part.tables.table[sequence.slot]
                assert row[: len(sequence.pages)].tolist() == sequence.pages
                assert not row[len(sequence.pages) :].any()
            assert {page: part.pool.count(page) for page in counts} == counts
            assert part.pool.used == len(counts)
            assert part.pool.span == max(counts, default=-1) + 1
            slots = [sequence.slot for sequence in part.running]
            assert len(set(slots)) == len(slots) <= self.limits.slots
            assert all(before.rank < after.rank for before, after in pairwise(part.running))
            shared = {page for page, count in counts.items() if count > 1}
            assert set(part.tables.shared) == shared
            owners = np.full(self.num_pages, self.limits.slots)
            for sequence in part.running:
                for page in sequence.pages:
                    if page not in shared:
                        owners[page] = sequence.slot
            np.testing.assert_array_equal(part.tables.owner, owners)
        for sequence in self.all:
            if self.limits.lookahead == 0 and sequence.state is State.DECODE:
                assert sequence.computed + 1 == len(sequence.tokens) + sequence.in_flight
            if sequence.id in self.scheduler:
                # What it has said so far is what it would say alone.
                said = outputs_of(sequence)
                assert said == self.alone[sequence.id][: len(said)]

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        # Each step does at least one thing for the first in line, so this many are more than enough.
        steps = 20 + 4 * sum(sequence.target + CONTEXT for sequence in self.all) * (1 + self.ahead)
        self.now -= 1e9  # nothing expires any more
        while len(self.scheduler):
            self.step(0)
            steps -= 1
            assert steps > 0, "a sequence never ends"
        while self.device.unread:
            self.device.read()
        self.everything_is_counted()
        for part in self.scheduler.parts:
            assert part.pool.used == 0
            assert not part.running
        for sequence in self.all:
            if sequence.id not in self.cancelled | self.dropped:
                assert outputs_of(sequence) == self.alone[sequence.id]


TestSchedulerOnDevice = SchedulerOnDevice.TestCase
TestSchedulerOnDevice.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
