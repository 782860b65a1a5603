"""A device made of dictionaries: it runs step plans on a cache whose every entry says which tokens led to it.

The key of a position is a hash of all tokens up to it, computed from the key before it *as the cache has it*, and the
next token follows from the key. A page that is overwritten too early, shared wrongly or read before it is written
so changes tokens, or is seen at once where whole rows are compared.
"""

from collections import deque
from collections.abc import Iterable
from zlib import crc32

from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence
from spmd_infer.generation.step_plan import StepPlan

VOCAB = 50
END = 7


def key_after(key: int, token: int) -> int:
    return crc32(token.to_bytes(4), key)


def keys_of(tokens: Iterable[int], namespace: str) -> list[int]:
    keys, key = [], crc32(namespace.encode())
    for token in tokens:
        key = key_after(key, token)
        keys.append(key)
    return keys


def expected(prompt: list[int], namespace: str, max_tokens: int) -> list[int]:
    """What the model says after a prompt."""
    key = keys_of(prompt, namespace)[-1]
    outputs: list[int] = []
    while len(outputs) < max_tokens and END not in outputs:
        outputs.append(key % VOCAB)
        key = key_after(key, outputs[-1])
    return outputs


class SimulatedDevice:
    """Runs plans in the order of their dispatch; results wait until they are read."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.cache: list[dict[tuple[int, int], int]] = [{} for _ in scheduler.parts]
        self.rows: dict[tuple[int, int], list[int]] = {}  # (part, slot) to its tokens
        self.unread: deque[list[tuple[Sequence, list[int]]]] = deque()
        self.computed = 0

    def dispatch(self, plan: StepPlan) -> None:
        self.move(plan.copies)
        writes: list[tuple[int, tuple[int, int], int]] = []
        results: list[tuple[Sequence, list[int]]] = []
        for sequence, start, length, last in plan.prefills:
            keys = keys_of(sequence.tokens[: start + length], sequence.namespace)
            self._check(sequence, keys[:start])
            writes += [(sequence.part, self._place(sequence, p), keys[p]) for p in range(start, start + length)]
            self.computed += length
            if last:
                assert start + length == len(sequence.tokens)
                results.append((sequence, [keys[-1] % VOCAB]))
                assert sequence.slot is not None
                self.rows[sequence.part, sequence.slot] = [*sequence.tokens, keys[-1] % VOCAB]
        for sequence in plan.decodes:
            assert sequence.slot is not None
            tokens = self.rows[sequence.part, sequence.slot]
            known, position = keys_of(tokens, sequence.namespace), len(tokens) - 1
            self._check(sequence, known[:position])
            width = self.scheduler.limits.width
            good, key = 1 + known[-1] % width, known[-1]
            accepted: list[int] = []
            for offset in range(width):
                # What follows a draft that was not accepted is garbage, and must be written over.
                writes.append((sequence.part, self._place(sequence, position + offset), key + (offset >= good)))
                if offset < good:
                    accepted.append(key % VOCAB)
                    key = key_after(key, accepted[-1])
            self.computed += width
            tokens += accepted
            results.append((sequence, accepted))
        places = [(part, place) for part, place, _ in writes]
        assert len(set(places)) == len(places), "two sequences write one position"
        for part, place, key in writes:
            self.cache[part][place] = key
        self.unread.append(results)

    def read(self) -> None:
        """Hand the earliest unread step's tokens to the scheduler, and end what has ended."""
        for sequence, tokens in self.unread.popleft():
            if self.scheduler.accept(sequence.id, tokens) and (
                sequence.outputs >= sequence.max_tokens or END in tokens
            ):
                self.scheduler.finish(sequence.id)

    def move(self, copies: list[tuple[int, int, int]]) -> None:
        """Copy pages ``(part, source, destination)``, all at once."""
        before = [dict(cache) for cache in self.cache] if copies else []
        for part, source, destination in copies:
            for offset in range(self.scheduler.limits.page_size):
                self.cache[part][destination, offset] = before[part].get((source, offset), -1)

    def _check(self, sequence: Sequence, keys: list[int]) -> None:
        cache = self.cache[sequence.part]
        assert [cache[self._place(sequence, position)] for position in range(len(keys))] == keys

    def _place(self, sequence: Sequence, position: int) -> tuple[int, int]:
        index, offset = divmod(position, self.scheduler.limits.page_size)
        assert sequence.slot is not None
        assert index < len(sequence.pages), "a position without a page"
        return int(self.scheduler.parts[sequence.part].tables.table[sequence.slot, index]), offset


def outputs_of(sequence: Sequence) -> list[int]:
    """A sequence's tokens up to its end token, or as many as it may have."""
    outputs = sequence.tokens[sequence.prompt_len :][: sequence.max_tokens]
    return outputs[: outputs.index(END) + 1] if END in outputs else outputs
