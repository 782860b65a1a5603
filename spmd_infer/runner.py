"""Batches of any size through the compiled programs: check, cut, pad, dispatch, fetch, put together.

The devices work on one piece while the host prepares the next and reads the last; never more than ``IN_FLIGHT`` pieces
are on the devices, so a stream of any length needs bounded memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

from spmd_infer.aggregate import Aggregate, Concat, together
from spmd_infer.axes import BATCH
from spmd_infer.batching import Buckets, pad_rows
from spmd_infer.errors import BatchError
from spmd_infer.inference import InferProgram, infer_program
from spmd_infer.programs import Program, Programs
from spmd_infer.progress import progress
from spmd_infer.signature import CheckedBatch, Signature
from spmd_infer.transfer import fetch

Results = Literal["all", "first", "placed"]
"""Who gets the results in a job of several processes: every rank, rank 0, or nobody: they stay on the devices."""

IN_FLIGHT = 2
COMPILE_THREADS = 4


@dataclass(frozen=True)
class _Piece:
    """A micro-batch on the devices.

    Attributes:
        rows: how many of its rows are real.
        last: whether it ends its batch.
        results: arrays that are being computed.
    """

    rows: int
    last: bool
    results: Any


@dataclass
class BatchRunner:
    """Runs one model's ``infer`` programs.

    Attributes:
        programs: the model, where it is, and its programs.
        signature: what it takes; None until the first batch shows it.
        buckets: the batch sizes that programs are compiled for.
    """

    programs: Programs
    signature: Signature | None
    buckets: Buckets
    _found: dict[Any, InferProgram] = field(default_factory=dict)
    _agreed: list[Program] = field(default_factory=list)

    def run(
        self,
        batches: Iterable[Any],
        aggregate: Aggregate | Callable[[Any], Any] | None,
        results: Results = "all",
    ) -> Iterator[Any]:
        """Yield the result of each batch, in order; see ``Engine.infer_stream``."""
        reduce = aggregate if isinstance(aggregate, Aggregate) and not isinstance(aggregate, Concat) else None
        finish = None if aggregate is None or isinstance(aggregate, Aggregate) else aggregate
        pieces = self._dispatch(batches, reduce)
        waiting: deque[_Piece] = deque()
        fetched: list[Any] = []
        failure: BatchError | None = None
        while True:
            while failure is None and len(waiting) < IN_FLIGHT:
                try:
                    piece = next(pieces, None)
                except BatchError as error:  # first give out what came before the bad batch
                    failure = error
                    break
                if piece is None:
                    break
                waiting.append(piece)
            if not waiting:
                break
            piece = waiting.popleft()
            values = piece.results if results == "placed" else fetch(piece.results)
            fetched.append(values if reduce is not None else _cut(values, piece.rows))
            if piece.last:
                if results == "first" and jax.process_index() != 0:
                    fetched = []
                    yield None
                    continue
                result, fetched = together(fetched, reduce), []
                yield result if finish is None else finish(result)
        if failure is not None:
            raise failure

    def warmup(self, sizes: Mapping[str, int | Sequence[int]], *, quiet: bool) -> int:
        """Compile the programs for every bucket; see ``Engine.warmup``."""
        if self.signature is None:
            raise BatchError("the inputs are not known yet: give the engine example= or inputs=, or call infer once")
        before = self.programs.compiles
        signature = self.signature
        batches = [batch for rows in self.buckets.sizes for batch in signature.blank_batches(rows, sizes)]

        def compile_for(batch: Any) -> None:
            checked = signature.check(batch)
            self._program(checked, checked.leaves, checked.rows, None)

        with ThreadPoolExecutor(COMPILE_THREADS) as pool, progress("compiling", len(batches), quiet=quiet) as advance:
            for _ in pool.map(compile_for, batches):
                advance(1)
        return self.programs.compiles - before

    def _dispatch(self, batches: Iterable[Any], reduce: Aggregate | None) -> Iterator[_Piece]:
        for batch in batches:
            signature = self.signature or Signature.from_example(batch)
            checked = signature.check(batch)
            row_weights = reduce.weights(checked.rows) if reduce is not None else None
            for start, stop, bucket in self.buckets.split(checked.rows):
                leaves = [
                    pad_rows(leaf, start, stop, bucket) if BATCH in spec.shape else leaf
                    for leaf, spec in zip(checked.leaves, checked.specs, strict=True)
                ]
                program = self._program(checked, leaves, bucket, reduce)
                self._agree(program)
                self.signature = signature  # the model took it: from now on batches must be like it
                weights = None if row_weights is None else _padded(row_weights[start:stop], bucket)
                yield _Piece(
                    stop - start, stop == checked.rows, program(self.programs.placement.params, leaves, weights)
                )

    def _agree(self, program: InferProgram) -> None:
        """Over several processes: no program runs before all ranks know that theirs are the same."""
        if program.rows.is_fully_addressable or program.program in self._agreed:
            return
        from spmd_infer.multihost.fingerprint import agree, of_program
        from spmd_infer.multihost.job import this_job

        agree(this_job(), f"program {program.program.name}", of_program(program.program.compiled.as_text() or ""))
        self._agreed.append(program.program)

    def _program(
        self, checked: CheckedBatch, leaves: Sequence[Any], bucket: int, reduce: Aggregate | None
    ) -> InferProgram:
        # The caller's own device arrays must survive the call; memory that the engine made may be reused.
        donate = not any(isinstance(leaf, jax.Array) for leaf in leaves)
        layout = self.programs.placement.key()
        key = (layout, checked.treedef, *[leaf.shape for leaf in leaves], type(reduce), donate)
        found = self._found.get(key)
        if found is None:
            found = infer_program(self.programs, checked, bucket, reduce, donate)
            self._found[key] = found
        return found


def _cut(results: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: x if len(x) == rows else x[:rows], results)


def _padded(weights: Any, bucket: int) -> Any:
    padded = np.zeros(bucket, np.float32)
    padded[: len(weights)] = weights
    return padded
