"""What the next step computes: decodes first, then prompts under the token budget."""

from __future__ import annotations

from bisect import insort

from spmd_infer.generation.admission import admit, best_offer
from spmd_infer.generation.limits import Limits
from spmd_infer.generation.parts import Part
from spmd_infer.generation.sequences import Sequence, State
from spmd_infer.generation.step_plan import PrefillChunk, StepPlan
from spmd_infer.generation.waiting import WaitingQueue


class StepPlanner:
    """Moves sequences between the queue and the slots, and fills steps.

    Args:
        limits: sizes and rules.
        parts: the data shards.
        waiting: the queue.
    """

    def __init__(self, limits: Limits, parts: tuple[Part, ...], waiting: WaitingQueue) -> None:
        self._limits = limits
        self._parts = parts
        self._waiting = waiting
        self._prefilling: list[Sequence] = []  # with a slot and a prompt to compute, by rank

    def fill(self, plan: StepPlan) -> None:
        """Put decodes, chunks and copies into a plan."""
        budgets = [self._plan_decodes(part, plan) for part in self._parts]
        self._plan_prefills(plan, budgets)
        # Only now, so that no chunk of this step reads pages that another one writes.
        for sequence, start, length, last in plan.prefills:
            self._parts[sequence.part].register(sequence, start + length)
            if last:
                self._prefilling.remove(sequence)
                sequence.state = State.DECODE
        for part in self._parts:
            plan.copies.extend((part.index, *copy) for copy in part.pool.take_copies())

    def restart(self) -> None:
        """Forget what runs, and what its pages hold."""
        self._prefilling.clear()
        for part in self._parts:
            part.restart()

    def vacate(self, sequence: Sequence) -> None:
        """Take slot and pages from a sequence that has them. The caller sets its state."""
        if sequence.state is State.PREFILL:
            self._prefilling.remove(sequence)
        self._parts[sequence.part].remove(sequence)

    def _plan_decodes(self, part: Part, plan: StepPlan) -> int:
        """Decode all that can; returns the tokens left for prompts, none where a sequence had to give way."""
        decodes = plan.decodes
        planned = 0
        preempted = len(plan.preempted)
        running = part.running
        index = 0
        while index < len(running):  # its end may be preempted meanwhile
            sequence = running[index]
            index += 1
            if sequence.state is not State.DECODE:
                continue
            width = self._limits.width + sequence.ahead
            computed = sequence.computed + width
            if computed > sequence.reach or (
                width > 1 and sequence.outputs + len(sequence.flights) >= sequence.max_tokens
            ):
                continue  # its last tokens are on the way
            if computed > sequence.room and not self._make_room(part, sequence, computed, plan):
                continue
            sequence.computed = computed
            sequence.in_flight += width
            if sequence.ahead:
                sequence.flights.append(sequence.ahead)
            sequence.flights.append(self._limits.width)
            planned += width
            decodes.append(sequence)
        if len(plan.preempted) > preempted:
            return 0
        return self._limits.token_budget - planned

    def _make_room(self, part: Part, sequence: Sequence, positions: int, plan: StepPlan) -> bool:
        while sequence.room < positions:
            if not part.grow(sequence):
                victim = part.running[-1]
                self._preempt(victim)
                plan.preempted.append(victim)
                if victim is sequence:
                    return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.vacate(sequence)
        sequence.computed = 0
        sequence.registered = 0
        sequence.preemptions += 1
        if sequence.flights:
            sequence.state = State.DRAINING
        else:
            self._waiting.push(sequence)

    def _plan_prefills(self, plan: StepPlan, budgets: list[int]) -> None:
        prefilling = self._prefilling[::-1]  # the next one last
        untouched = [True] * len(budgets)
        blocked = False
        while True:
            waiting = None if blocked else self._waiting.first()
            if prefilling and (waiting is None or prefilling[-1].rank < waiting.rank):
                sequence = prefilling.pop()
            elif waiting is None:
                return
            elif self._admit(waiting, budgets):
                sequence = waiting
            else:
                blocked = True
                continue
            part = sequence.part
            length = self._chunk_length(sequence, budgets[part], untouched[part])
            if length == 0:
                continue
            budgets[part] -= length
            untouched[part] = False
            start = sequence.computed
            sequence.computed += length
            last = sequence.computed == sequence.target
            if last:
                sequence.in_flight += 1
                sequence.flights.append(1)
            plan.prefills.append(PrefillChunk(sequence, start, length, last))

    def _chunk_length(self, sequence: Sequence, budget: int, untouched: bool) -> int:
        left = sequence.target - sequence.computed
        if not self._limits.chunked:
            return left if left <= budget or (untouched and budget > 0) else 0
        length = min(left, budget, self._limits.max_chunk)
        if length < left:
            length -= (sequence.computed + length) % self._limits.page_size
        return max(length, 0)

    def _admit(self, sequence: Sequence, budgets: list[int]) -> bool:
        offer = best_offer(sequence, self._parts, budgets, self._limits)
        if offer is None:
            return False
        admit(sequence, offer, self._limits)
        self._waiting.left()
        insort(self._prefilling, sequence, key=lambda other: other.rank)
        return True
