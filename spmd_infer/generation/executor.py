"""What a step's plan is dispatched as: its chunks and rows in the sizes that programs are compiled for.

Nothing here waits for the devices: what a step chose is read later, with ``Dispatched.read``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from spmd_infer.generation.adapters import Adapters
from spmd_infer.generation.batches import Layout
from spmd_infer.generation.dispatched import Dispatched, DispatchedDrafts, DispatchedStep
from spmd_infer.generation.dispatcher import Dispatcher
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.prompt_chunks import ChunkKind, Span, by_kind, scored
from spmd_infer.generation.requests import Request
from spmd_infer.generation.speculation import Speculation
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.step_sizes import StepSizes
from spmd_infer.models.adapters import RowAdapters

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

MOST_COPIES = 64
"""Pages copied by one program."""

Entry = tuple[Request, int, int]
"""A request, and the part and slot that it runs in."""


class Executor:
    """Runs steps on one engine.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes.
        eos_ids: the model's end tokens.
        slots: sequences that run at a time in each part.
        num_pages: pages of each part to begin with.
        cache_dtype: what the cache holds, as ``CacheFormat.of`` takes it.
        speculation: where drafts come from; None for none.
        adapters: those that requests may have; None for none.

    Attributes:
        dispatcher: what the devices hold.
    """

    def __init__(
        self,
        engine: Engine,
        config: Any,
        eos_ids: Collection[int],
        *,
        slots: int,
        num_pages: int,
        cache_dtype: str = "auto",
        speculation: Speculation | None = None,
        adapters: Adapters | None = None,
    ) -> None:
        self.dispatcher = Dispatcher(
            engine,
            config,
            eos_ids,
            slots=slots,
            num_pages=num_pages,
            cache_dtype=cache_dtype,
            speculation=speculation,
        )
        self._adapters = adapters

    @property
    def sizes(self) -> StepSizes:
        """What programs are compiled for."""
        return self.dispatcher.sizes

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return self.dispatcher.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        return self.dispatcher.page_bytes

    def restart(self) -> None:
        """Empty slots and pages, after a step that failed."""
        self.dispatcher.restart()

    def resize(self, num_pages: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Grow or shrink every part's pool, after moving pages ``(part, source, destination)``."""
        for start in range(0, len(moves), MOST_COPIES):
            self.copy(moves[start : start + MOST_COPIES])
        self.dispatcher.resize(num_pages)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages ``(part, source, destination)``, all at once."""
        if not copies:
            return
        layout = Layout.of([part for part, _, _ in copies], self.dispatcher.parts, self.sizes.copies)
        sources = layout.ints([source for _, source, _ in copies])
        targets = layout.ints([target for _, _, target in copies], fill=self.num_pages)
        self.dispatcher.copy_pages(sources, targets)

    def prefill(self, chunks: Sequence[PrefillChunk], requests: Sequence[Request]) -> list[DispatchedStep]:
        """Run chunks of prompts; those of near lengths together.

        Args:
            chunks: from the step's plan.
            requests: whose each is.

        Returns:
            The first tokens of the requests whose prompts end here, after the scores of those that ask for them.
        """
        spans = [Span.of(chunk, request) for chunk, request in zip(chunks, requests, strict=True)]
        return [step for kind, group in by_kind(spans, self.sizes) for step in self._prefill_group(kind, group)]

    def _prefill_group(self, kind: ChunkKind, spans: Sequence[Span]) -> list[DispatchedStep]:
        since = time.perf_counter()
        bucket = partial(self.sizes.chunk_rows, length=kind.length, earlier=kind.earlier)
        layout = Layout.of([span.chunk.sequence.part for span in spans], self.dispatcher.parts, bucket)
        adapters = self._adapters_of(layout, [span.request for span in spans])
        logits, scores = self.dispatcher.run_chunks(kind, layout, spans, adapters)
        done: list[DispatchedStep] = []
        if scores is not None:
            done.append(scored(layout, spans, scores, since))
        if any(span.chunk.last for span in spans):
            done.append(self.dispatcher.enter(kind, layout, spans, logits, since))
        return done

    def decode(
        self, entries: Sequence[Entry], tables: Sequence[PageTables], ahead: Sequence[Sequence[int]] | None = None
    ) -> Pending:
        """Dispatch one token more of each entry.

        Args:
            entries: those that run.
            tables: of each part.
            ahead: the tokens of each that must follow its last one and are run as well; None where none has any.

        Returns:
            The step; where a request needs a mask, its choice waits for ``Pending.finish``.
        """
        since, own = time.perf_counter(), self.dispatcher
        fit = partial(self.sizes.decode, pool=self.num_pages, shared=max(len(each.shared) for each in tables))
        layout = Layout.of([part for _, part, _ in entries], own.parts, lambda rows: fit(rows)[0])
        requests = [request for request, _, _ in entries]
        step = tuple((request, part, row) for request, (part, row) in zip(requests, layout.places, strict=True))
        slots = layout.ints([slot for _, _, slot in entries], fill=own.slots)
        longest = max(len(request.prompt_ids) + len(request.token_ids) for request in requests)
        adapters = self._adapters_of(layout, requests)
        rows = own.rows(layout, slots, tables, fit(layout.rows)[1], longest, ahead=ahead, adapters=adapters)
        ruled = any(request.params.needs_rules for request in requests)
        if own.speculator is not None and not ruled and own.speculator.pace.wants(len(entries)):
            drafted = own.speculate(rows, step, since)
            return Pending(lambda: drafted)
        logits = own.forward(rows)
        if any(request.constraint is not None for request in requests):
            return Pending(lambda: own.choose(logits, rows, layout, step, since, ruled=True))
        done = own.choose(logits, rows, layout, step, since, ruled=ruled)
        return Pending(lambda: done)

    def _adapters_of(self, layout: Layout, requests: Sequence[Request]) -> RowAdapters | None:
        return None if self._adapters is None else self._adapters.rows(layout, [each.adapter for each in requests])


@dataclass(frozen=True)
class Pending:
    """A decode step whose forward pass is dispatched.

    Attributes:
        finish: dispatches the choice, once the masks of its requests are known, and gives the step.
    """

    finish: Callable[[], Dispatched | DispatchedDrafts]
