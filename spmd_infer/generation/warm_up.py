"""Compiling every program of generation ahead, several at a time, so that none is compiled while requests wait.

The dispatcher's own code says which programs there are: a shadow of it, with shapes in the place of its arrays, goes
through every kind of step in every size, and what it would dispatch is compiled.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING

from spmd_infer.generation.adapters import Adapters
from spmd_infer.generation.batches import Layout
from spmd_infer.generation.dispatcher import Dispatcher
from spmd_infer.generation.kv_pages import PAGE_SIZE
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.prompt_chunks import ChunkKind
from spmd_infer.generation.step_sizes import SizesAhead
from spmd_infer.generation.steps import Rows
from spmd_infer.model_program import compiling_only
from spmd_infer.models.adapters import RowAdapters
from spmd_infer.progress import progress

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_MOST_THREADS = 4  # XLA's compiler itself takes several, and a gigabyte of memory for each large program


@dataclass(frozen=True)
class WarmedUp:
    """What a warm-up has done.

    Attributes:
        programs: compiled, or found in the compile cache; those that existed are not counted.
        seconds: that it took.
        sizes: what they are for.
    """

    programs: int
    seconds: float
    sizes: SizesAhead


@dataclass(frozen=True)
class Warmer:
    """Compiles what an executor will dispatch.

    Attributes:
        dispatcher: the executor's; nothing of it changes but that its programs exist.
        sizes: what to compile for.
        max_pages: pages of the longest sequence that there may be, as the scheduler counts them.
        longest_pages: pages of the longest that will come.
        rules: whether requests with rules about single tokens, constraints among them, will come.
        jumps: rows of the largest step that runs several known tokens of a row; 0 for none.
        adapters: those that requests may have; None for none. Rows with adapters are compiled for once one was loaded.
    """

    dispatcher: Dispatcher
    sizes: SizesAhead
    max_pages: int
    longest_pages: int
    rules: bool
    jumps: float
    adapters: Adapters | None

    def __call__(self, engines: Sequence[Engine], *, quiet: bool = False) -> WarmedUp:
        """Compile everything.

        Args:
            engines: whose programs are counted.
            quiet: show no progress.
        """
        begin, before = time.perf_counter(), sum(engine.compiles for engine in engines)
        if self.rules:
            self.dispatcher.make_room_for_rules()
        shadows = self._pools()
        jobs = self._jobs(shadows)
        with (
            ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="warm-up") as threads,
            progress("compiling", len(jobs), quiet=quiet) as advance,
        ):
            for _ in threads.map(_compile, jobs):
                advance(1)
        compiled = sum(engine.compiles for engine in engines) - before
        return WarmedUp(compiled, time.perf_counter() - begin, self.sizes)

    def _pools(self) -> dict[int, Dispatcher]:
        """A shadow of the dispatcher for each size of its pool, after the programs that make the pool grow."""
        shadows: dict[int, Dispatcher] = {}
        shadow = self.dispatcher.shadow()
        with compiling_only():
            for size in (*reversed([pool for pool in self.sizes.pools if pool < shadow.num_pages]), *self.sizes.pools):
                if size != shadow.num_pages:
                    shadow.resize(size)
                shadows[size] = shadow.shadow()
        return shadows

    def _jobs(self, shadows: dict[int, Dispatcher]) -> list[Callable[[], None]]:
        """The longest first, so that no thread is left with one at the end."""
        decodes = [
            partial(self._decode, shadows[pool], rows, step_rows)
            for rows, pool, shared in self.sizes.decodes
            for step_rows in self._ways(shadows[pool], rows, pool, shared)
        ]
        for rows, length, earlier in self.sizes.chunks:
            self.dispatcher.choose_attention(ChunkKind(length, earlier, ruled=False), rows)
        chunks = [partial(self._chunks, shadows, *size) for size in self.sizes.chunks]
        copies = [partial(self._copies, shadow, count) for shadow in shadows.values() for count in self.sizes.copies]
        shrinking = [partial(shadows[pool].shadow().resize, less) for less, pool in pairwise(self.sizes.pools)]
        return [*decodes, *chunks, *copies, *shrinking]

    def _ways(self, shadow: Dispatcher, rows: int, pool: int, shared: int) -> list[Rows]:
        """A decode step's rows in each form that they take as texts get longer, without and with adapters."""
        layout = self._layout(rows)
        slots = layout.ints([], fill=self.dispatcher.slots)
        tables = [PageTables(self.dispatcher.slots, pool, self.max_pages) for _ in range(layout.parts)]
        forms = {}
        for pages in range(1, self.longest_pages + 1):
            found = shadow.rows(layout, slots, tables, shared, pages * PAGE_SIZE - 1)
            forms[found.view.way, found.view.tables.shape] = found
        if self.rules and rows <= self.jumps:
            forms["ahead", ()] = shadow.rows(layout, slots, tables, shared, 1, ahead=())
        return [replace(form, adapters=used) for form in forms.values() for used in self._adapters_of(layout)]

    def _decode(self, shadow: Dispatcher, rows: int, step_rows: Rows) -> None:
        layout, own = self._layout(rows), shadow.shadow()
        if shadow.speculator is not None:
            shadow.shadow().speculate(step_rows, ())
        logits = own.forward(step_rows)
        if step_rows.ahead is None:
            own.choose(logits, step_rows, layout, (), ruled=False)
        if self.rules:
            own.choose(logits, step_rows, layout, (), ruled=True)

    def _chunks(self, shadows: dict[int, Dispatcher], rows: int, length: int, earlier: int) -> None:
        layout = self._layout(rows)
        for shadow in shadows.values():
            own = shadow.shadow()
            for used in self._adapters_of(layout):
                logits, _ = own.run_chunks(ChunkKind(length, earlier, ruled=False), layout, [], used)
        for ruled in (False, True)[: 1 + self.rules]:
            own.enter(ChunkKind(length, earlier, ruled), layout, [], logits)
        own.enter_texts(layout)

    def _copies(self, shadow: Dispatcher, count: int) -> None:
        nobody = self._layout(count).ints([])
        shadow.shadow().copy_pages(nobody, nobody)

    def _layout(self, rows: int) -> Layout:
        return Layout(self.dispatcher.parts, rows, ())

    def _adapters_of(self, layout: Layout) -> list[RowAdapters | None]:
        used = None if self.adapters is None else self.adapters.unused_rows(layout)
        return [None] if used is None else [None, used]


def _compile(job: Callable[[], None]) -> None:
    with compiling_only():
        job()
