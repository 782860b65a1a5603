"""The memory that a step's intermediate results take, as XLA assigns it.

Four things decide it. Fusion: a value that is computed inside what uses it takes none. Reuse: an elementwise operation
writes over an operand that nobody reads any more, and what is alive at different times shares memory; the memory of the
results serves intermediate values before they exist. Collectives: they never write over their operand, and XLA combines
independent all-reduces, whose operands and results are then alive together. And order: that of the program here, which
a scheduler that minimises memory roughly keeps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from spmd_infer.planning.flow import Flow, Op
from spmd_infer.planning.heap import Slot, heap_bytes
from spmd_infer.planning.values import Product, Relabel, Window

_MOST_READERS = 6
"""A value with more readers, such as an image that a depthwise convolution reads once for each place of its window, is
stored: XLA limits how often code is repeated inside one operation."""


@dataclass(frozen=True)
class Effect:
    """What an operation communicates, as far as memory is concerned.

    Attributes:
        moves: whether a constraint is a collective, not nothing.
        reduced: the mesh axes over which a product's partial results are summed.
        fetched: bytes that a product needs gathered besides weights, for as long as it runs.
        weight: bytes of the gathered weight that it needs.
    """

    moves: bool = False
    reduced: tuple[str, ...] = ()
    fetched: int = 0
    weight: int = 0


Effects = Callable[[Product | Relabel], Effect]


def peak_bytes(flow: Flow, size: Callable[[int], int], effects: Effects, *, early_gathers: bool = False) -> int:
    """The most bytes of intermediate results on a device at any time.

    Args:
        flow: the step.
        size: bytes on a device of each of its values.
        effects: what an operation communicates.
        early_gathers: whether weights are all gathered as soon as the step begins (XLA on CPU), instead of each before
            the product that needs it.
    """
    return _Assignment(flow, size, effects, early_gathers).peak()


@dataclass
class _Assignment:
    flow: Flow
    size: Callable[[int], int]
    effects: Effects
    early_gathers: bool
    _stored: set[int] = field(default_factory=set)
    _inlined: dict[int, dict[int, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = [Effect() if isinstance(op.item, Window | None) else self.effects(op.item) for op in self.flow.ops]
        self._effects = found
        self._can_fuse = [_can_fuse(op, effect) for op, effect in zip(self.flow.ops, found, strict=True)]
        self._root: dict[int, int] = {}  # through constraints that are nothing
        self._maker: dict[int, int] = {}
        self._users: dict[int, list[int]] = defaultdict(list)
        for place, (op, effect) in enumerate(zip(self.flow.ops, found, strict=True)):
            if op.kind in ("constraint", "window") and not effect.moves:
                self._root[op.outputs[0]] = self._of(op.inputs[0]) if op.inputs else op.outputs[0]
                continue
            for value in op.outputs:
                self._maker[value] = place
            for value in dict.fromkeys(map(self._of, op.inputs)):
                self._users[value].append(place)
        self._results = {self._of(value) for value in self.flow.results}
        self._into: dict[int, set[int]] = {}
        for value in sorted(self._maker, key=self._maker.__getitem__, reverse=True):  # users before what they use
            if self._is_stored(value):
                self._stored.add(value)

    def _of(self, value: int) -> int:
        return self._root.get(value, value)

    def _takes_fused(self, place: int) -> bool:
        return self._can_fuse[place] or self.flow.ops[place].fuses

    def _is_stored(self, value: int) -> bool:
        """Whether a value is written to memory; what it is computed inside of, it remembers."""
        maker, users = self.flow.ops[self._maker[value]], self._users[value]
        into = self._into[value] = set()
        for user in users:
            for made in self.flow.ops[user].outputs:
                into |= {user} if made in self._stored else self._into.get(made, set())
        if value in self._results or not self._can_fuse[self._maker[value]]:
            return bool(users) or value in self._results
        if any(not self._takes_fused(user) for user in users):
            return True
        if len(users) > _MOST_READERS:
            return True
        if maker.kind == "costly" and any(self.flow.ops[user].kind == "spread" for user in users):
            return True
        return len(into) > 1 and not maker.twice

    def _reads(self, place: int) -> dict[int, bool]:
        """Stored values that an operation reads, itself or inside it, and whether only at the place that it writes."""
        op = self.flow.ops[place]
        found: dict[int, bool] = {}
        for value in dict.fromkeys(map(self._of, op.inputs)):
            same_shape = op.elementwise and not any(self._of(v) == value for v in op.reshaped)
            for source, same_place in self._behind(value, place).items():
                found[source] = found.get(source, True) and same_place and same_shape
        return found

    def _behind(self, value: int, user: int) -> dict[int, bool]:
        """What a user reads of an operand: the operand itself, or what it is computed from inside the user."""
        if value not in self._maker:
            return {}
        place = self._maker[value]
        fusible = self._can_fuse[place]
        again = fusible and self.flow.ops[place].twice and self._takes_fused(user)
        if value in self._stored and not again:
            return {value: not self.flow.ops[place].flat_output}
        if value not in self._inlined:
            self._inlined[value] = self._reads(place) if fusible else {}
        return self._inlined[value]

    def peak(self) -> int:
        return heap_bytes(self._beside_results(*self._slots()))

    def _slots(self) -> tuple[list[Slot], list[Slot]]:
        """The memory of all stored values, and that of the results among it.

        An operation runs at twice its number; what precedes it, such as a collective, at the moment before.
        """
        reads = {place: self._reads(place) for place in self._running()}
        end = 2 * len(self.flow.ops)
        last = {value: 2 * place for place, sources in reads.items() for value in sources}
        last |= dict.fromkeys(self._results, end)
        slots: dict[int, Slot] = {}
        made: list[Slot] = []
        pending: dict[int, tuple[str, ...]] = {}

        def sum_up(values: Sequence[int], now: int) -> None:
            for value in values:
                slots[value].end, slots[value].views = now - 1, True
                slots[value] = Slot(self.size(value), now - 1, last.get(value, now))
                made.append(slots[value])
                del pending[value]

        for place, sources in reads.items():
            op, effect, now = self.flow.ops[place], self._effects[place], 2 * place
            for axes in {pending[value] for value in sources if value in pending}:
                sum_up([value for value, over in pending.items() if over == axes], now)
            if effect.fetched:
                made.append(Slot(effect.fetched, now, now))
            for value in op.outputs:
                if value not in self._stored:
                    continue
                slot = self._overwritten(op, value, sources, last, slots, now)
                if slot is None:
                    slot = Slot(self.size(value), now, now)
                    made.append(slot)
                slot.end = max(slot.end, last.get(value, now))
                slots[value] = slot
                if effect.reduced:
                    pending[value] = effect.reduced
        sum_up(list(pending), end)
        return [*made, *self._gathered_weights(reads)], [slots[value] for value in self._results if value in slots]

    def _gathered_weights(self, running: Container[int]) -> Iterable[Slot]:
        """The memory of weights that are gathered, until the last operation that runs with them."""
        gathers: dict[int, Slot] = {}
        for place, (op, effect) in enumerate(zip(self.flow.ops, self._effects, strict=True)):
            if not effect.weight:
                continue
            for runs in [place] if place in running else sorted(self._into.get(op.outputs[0], ())):
                key, start = (op.inputs[-1], 0) if self.early_gathers else (-1 - runs, 2 * runs - 1)
                known = gathers.setdefault(key, Slot(0, start, 2 * runs))
                known.size, known.end = max(known.size, effect.weight), max(known.end, 2 * runs)
        return gathers.values()

    def _running(self) -> list[int]:
        """Operations that run by themselves, not inside another."""
        return [
            place
            for place, op in enumerate(self.flow.ops)
            if (op.kind != "constraint" or self._effects[place].moves) and any(v in self._stored for v in op.outputs)
        ]

    def _overwritten(
        self,
        op: Op,
        value: int,
        sources: Mapping[int, bool],
        last: Mapping[int, int],
        slots: Mapping[int, Slot],
        now: int,
    ) -> Slot | None:
        """The memory of an operand that dies here, if the result may be written over it."""
        if op.kind == "update":
            sources = {self._of(op.inputs[0]): True}
        elif not op.elementwise or any(value in self.flow.ops[user].flat_inputs for user in self._users[value]):
            return None
        for source, same_place in sources.items():
            slot = slots.get(source)
            if slot is not None and same_place and last[source] <= now == slot.end and slot.size == self.size(value):
                return slot
        return None

    def _beside_results(self, slots: Sequence[Slot], results: Sequence[Slot]) -> list[Slot]:
        """Memory that is not a result's: neither the results nor what fits into their memory before they exist."""
        own = {id(slot) for slot in results}
        rooms = [(slot.size, [slot]) for slot in sorted(results, key=lambda slot: -slot.size)]
        kept = []
        for slot in sorted((s for s in slots if id(s) not in own), key=lambda s: (-s.size, s.start)):
            for size, inside in rooms:
                if slot.size <= size and not any(slot.meets(other) for other in inside):
                    inside.append(slot)
                    break
            else:
                kept.append(slot)
        return kept


def _can_fuse(op: Op, effect: Effect) -> bool:
    """Whether an operation can be computed inside what uses its result. So can look-ups that send nothing they find."""
    if isinstance(op.item, Product) and op.item.lookup:
        return effect == Effect(weight=effect.weight)
    return op.fusible
