"""The device side of generation: cache, slots, and the programs that a step's plan is dispatched to.

Nothing here waits for the devices: what a step chose is read later, with ``Dispatched.read``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spmd_infer.generation.adapters import Adapters
from spmd_infer.generation.attention_choice import AttentionChoice
from spmd_infer.generation.batches import Ints, Layout, page_arrays
from spmd_infer.generation.dispatched import Dispatched, DispatchedDrafts, DispatchedStep, Taking
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.prompt_chunks import (
    MOST_STOPS,
    ChunkKind,
    Span,
    by_kind,
    chunk_arrays,
    entering_arrays,
    pages_before,
    pages_for,
    scored,
    target_arrays,
)
from spmd_infer.generation.requests import Request
from spmd_infer.generation.rule_book import RuleBook
from spmd_infer.generation.sampling import SamplingArrays, sampling_arrays, sampling_flags
from spmd_infer.generation.slots import Slots, empty_slots
from spmd_infer.generation.speculation import Speculation
from spmd_infer.generation.speculator import Speculator
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.step_programs import StepPrograms, power_of_two
from spmd_infer.generation.steps import Choice, Rows
from spmd_infer.generation.token_rules import rule_flags
from spmd_infer.models.adapters import RowAdapters
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.page_view import PageView

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

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
        self._engine, self._config, self._eos_ids = engine, config, frozenset(eos_ids)
        self._adapters, self._speculation = adapters, speculation
        self._parts, self._slots = engine.data_parts, slots
        self._cache_dtype = cache_dtype
        platform = engine.mesh.devices.flat[0].platform
        self._format = CacheFormat.of(cache_dtype, platform, jnp.result_type(engine.dtype, jnp.bfloat16))
        self._programs = StepPrograms(engine, config, self._format)
        self._attention = AttentionChoice(engine, config, self._format)
        self._num_pages = num_pages
        self._start(num_pages)

    def _start(self, num_pages: int) -> None:
        rows = SamplingArrays(**sampling_arrays([], self._eos_ids, most_stops=MOST_STOPS))  # type: ignore[arg-type]  # numpy
        self._state: Slots = self._programs.laid_out("slots", lambda _: self._empty_state(rows))
        self._book = RuleBook(self._programs, parts=self._parts, slots=self._slots, vocab_size=self._config.vocab_size)
        self._pages = self._programs.zeros(num_pages)
        self._speculator: Speculator | None = None
        if self._speculation is not None:
            self._speculator = Speculator(
                self._engine,
                self._config,
                self._speculation,
                slots=self._slots,
                num_pages=num_pages,
                cache_dtype=self._cache_dtype,
            )

    def restart(self) -> None:
        """Empty slots and pages, after a step that failed: what it took may be gone."""
        for name in ("_pages", "_state", "_book", "_speculator"):
            self.__dict__.pop(name, None)  # so that there is room for new ones
        self._start(self.num_pages)

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return self._num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        drafts = self._speculator.page_bytes if self._speculator is not None else 0
        return self._programs.page_bytes + drafts

    def resize(self, num_pages: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Grow or shrink every part's pool, after moving pages ``(part, source, destination)``."""
        self.copy(moves)
        self._pages, self._num_pages = self._programs.resized(self._pages, num_pages), num_pages
        if self._speculator is not None:
            self._speculator.resize(num_pages)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages ``(part, source, destination)``, all at once."""
        if not copies:
            return
        layout = Layout.of([part for part, _, _ in copies], self._parts, power_of_two)
        sources = layout.ints([source for _, source, _ in copies])
        targets = layout.ints([target for _, _, target in copies], fill=self.num_pages)
        self._pages = self._programs.copy(self._pages, sources, targets)
        if self._speculator is not None:
            self._speculator.copy(sources, targets)

    def prefill(self, chunks: Sequence[PrefillChunk], requests: Sequence[Request]) -> list[DispatchedStep]:
        """Run chunks of prompts; those of near lengths together.

        Args:
            chunks: from the step's plan.
            requests: whose each is.

        Returns:
            The first tokens of the requests whose prompts end here, after the scores of those that ask for them.
        """
        spans = [Span.of(chunk, request) for chunk, request in zip(chunks, requests, strict=True)]
        groups = by_kind(spans).items()
        return [step for kind, group in groups for step in self._prefill_group(kind, group)]

    def _prefill_group(self, kind: ChunkKind, spans: Sequence[Span]) -> list[DispatchedStep]:
        bucket = partial(self._programs.buckets.fit, f"prefill_{kind.length}_{kind.earlier}")
        layout = Layout.of([span.chunk.sequence.part for span in spans], self._parts, bucket)
        chunk = chunk_arrays(layout, spans, kind.length)
        if not kind.earlier:
            chunk = replace(chunk, way=self._attention.of_prompts(layout.rows, kind.length))
        if kind.adapted:
            chunk = replace(chunk, adapters=self._adapters_of(layout, [span.request for span in spans]))
        tables = pages_before(layout, spans, kind.earlier) if kind.earlier else None
        targets = pages_for(layout, spans, kind.length, nowhere=self.num_pages)
        earlier = None if tables is None else self._programs.gather(self._pages, tables)
        done: list[DispatchedStep] = []
        if kind.num_top is None:
            logits, keys, values = self._programs.prefill(earlier, chunk)
        else:
            asked = target_arrays(layout, spans, kind)
            logits, keys, values, scores = self._programs.prefill_scored(earlier, chunk, asked)
            done.append(scored(layout, spans, scores))
        self._pages = self._programs.insert(self._pages, keys, values, targets)
        if self._speculator is not None:
            self._speculator.prefill(chunk, tables, targets)
        if any(span.chunk.last for span in spans):
            done.append(self._enter(kind, layout, spans, logits))
        return done

    def _enter(self, kind: ChunkKind, layout: Layout, spans: Sequence[Span], logits: jax.Array) -> Dispatched:
        """Choose what follows the prompts that end."""
        entering = entering_arrays(layout, spans, self._eos_ids, nobody=self._slots)
        if kind.ruled:
            masks = self._book.masks(layout, [span.request for span in spans])
            entering = replace(entering, rules=self._book.entering(layout, spans), mask=masks)
        chosen, self._state, rules = self._programs.enter(
            logits, self._state, self._book.rules if kind.ruled else None, entering
        )
        self._book.rules = rules if kind.ruled else self._book.rules
        if self._speculator is not None:
            self._speculator.enter(self._state, entering.slots, layout, spans)
        rows = [
            (span.request, part, row) for span, (part, row) in zip(spans, layout.places, strict=True) if span.chunk.last
        ]
        return Dispatched("prefill", chosen, tuple(rows))

    def decode(self, entries: Sequence[Entry], tables: Sequence[PageTables]) -> Pending:
        """Dispatch one token more of each entry.

        Args:
            entries: those that run.
            tables: of each part.

        Returns:
            The step; where a request needs a mask, its choice waits for ``Pending.finish``.
        """
        layout = Layout.of([part for _, part, _ in entries], self._parts, partial(self._programs.buckets.fit, "decode"))
        slots = layout.ints([slot for _, _, slot in entries], fill=self._slots)
        requests = [request for request, _, _ in entries]
        view = PageView(**vars(page_arrays(layout, slots, tables)))
        if self._speculator is None:  # whose view is for two models, and steps of several lengths
            view = self._attention.for_step(view, max(len(r.prompt_ids) + len(r.token_ids) for r in requests))
        adapters = self._adapters_of(layout, requests)
        rows = Rows(slots=slots, view=view, adapters=adapters)  # type: ignore[arg-type]  # numpy
        step = tuple((request, part, row) for request, (part, row) in zip(requests, layout.places, strict=True))
        params = [request.params for request in requests]
        ruled = any(p.needs_rules for p in params)
        if self._speculator is not None and not ruled and self._speculator.pace.wants(len(entries)):
            flags: Any = sampling_flags(params)
            drafted, self._pages, self._state = self._speculator.decode(self._pages, self._state, rows, flags, step)
            return Pending(lambda: drafted)
        logits, self._pages = self._programs.forward(self._pages, self._state, rows)
        if any(request.constraint is not None for request in requests):
            return Pending(lambda: self._choose(logits, slots, layout, step))
        done = self._choose(logits, slots, layout, step)
        return Pending(lambda: done)

    def _choose(self, logits: jax.Array, slots: Ints, layout: Layout, step: Taking) -> Dispatched:
        params = [request.params for request, _, _ in step]
        ruled = any(p.needs_rules for p in params)
        choice = Choice(
            slots=slots,  # type: ignore[arg-type]  # numpy, as below
            flags=sampling_flags(params),  # type: ignore[arg-type]
            ruled=layout.ints([p.needs_rules for p in params]) > 0 if ruled else None,  # type: ignore[arg-type]
            rule_flags=rule_flags(params) if ruled else None,  # type: ignore[arg-type]
            mask=self._book.masks(layout, [request for request, _, _ in step]) if ruled else None,
        )
        chosen, self._state, rules = self._programs.choose(
            logits, self._state, self._book.rules if ruled else None, choice
        )
        self._book.rules = rules if ruled else self._book.rules
        if self._speculator is not None:
            self._speculator.note(self._state, slots)
        return Dispatched("decode", chosen, step)

    def _adapters_of(self, layout: Layout, requests: Sequence[Request]) -> RowAdapters | None:
        return None if self._adapters is None else self._adapters.rows(layout, [each.adapter for each in requests])

    def _empty_state(self, rows: SamplingArrays) -> Slots:
        def zeros() -> jax.Array:  # a buffer each, since each is donated
            return jnp.zeros((self._parts, self._slots + 1), jnp.int32)

        return Slots(zeros(), zeros(), zeros(), empty_slots(rows, self._parts, self._slots))


@dataclass(frozen=True)
class Pending:
    """A decode step whose forward pass is dispatched.

    Attributes:
        finish: dispatches the choice, once the masks of its requests are known, and gives the step.
    """

    finish: Callable[[], Dispatched | DispatchedDrafts]
