"""Cache, slots and rules on the devices, and the programs that change them: every call dispatches, and none waits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from spmd_infer.generation.attention_choice import AttentionChoice
from spmd_infer.generation.batches import Ints, Layout
from spmd_infer.generation.decode_rows import choice_arrays, decode_rows
from spmd_infer.generation.dispatched import Dispatched, DispatchedDrafts, Taking
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.prompt_chunks import (
    MOST_STOPS,
    ChunkKind,
    Span,
    chunk_arrays,
    entering_arrays,
    pages_before,
    pages_for,
    target_arrays,
)
from spmd_infer.generation.prompt_scores import PromptScores
from spmd_infer.generation.rule_book import RuleBook
from spmd_infer.generation.sampling import SamplingArrays, sampling_arrays, sampling_flags
from spmd_infer.generation.slots import Slots
from spmd_infer.generation.speculation import Speculation
from spmd_infer.generation.speculator import Speculator
from spmd_infer.generation.step_programs import StepPrograms
from spmd_infer.generation.step_sizes import StepSizes
from spmd_infer.generation.steps import Rows
from spmd_infer.model_program import shapes_of
from spmd_infer.models.adapters import RowAdapters
from spmd_infer.models.cache_formats import CacheFormat

if TYPE_CHECKING:
    from spmd_infer.engine import Engine


class Dispatcher:
    """What one engine's devices hold for generation.

    Args:
        engine: holds a decoder.
        config: the decoder's sizes.
        eos_ids: the model's end tokens.
        slots: sequences that run at a time in each part.
        num_pages: pages of each part to begin with.
        cache_dtype: what the cache holds, as ``CacheFormat.of`` takes it.
        speculation: where drafts come from; None for none.

    Attributes:
        parts: parts of the rows.
        slots: the same.
        speculator: drafts and verifies; None where no drafts are tried.
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
    ) -> None:
        self._engine, self._config, self._eos_ids = engine, config, frozenset(eos_ids)
        self._speculation, self._cache_dtype = speculation, cache_dtype
        self.parts, self.slots = engine.data_parts, slots
        platform = engine.mesh.devices.flat[0].platform
        self._format = CacheFormat.of(cache_dtype, platform, jnp.result_type(engine.dtype, jnp.bfloat16))
        self._programs = StepPrograms(engine, config, self._format)
        self._attention = AttentionChoice(engine, config, self._format)
        self._num_pages, self._largest_rules = num_pages, False
        self._start(num_pages)

    def _start(self, num_pages: int) -> None:
        rows = SamplingArrays(**sampling_arrays([], self._eos_ids, most_stops=MOST_STOPS))  # type: ignore[arg-type]  # numpy
        self._state: Slots = self._programs.laid_out("slots", lambda _: Slots.empty(rows, self.parts, self.slots))
        self._book = RuleBook(self._programs, parts=self.parts, slots=self.slots, vocab_size=self._config.vocab_size)
        if self._largest_rules:
            self._book.make_room()
        self._pages = self._programs.zeros(num_pages)
        self.speculator: Speculator | None = None
        if self._speculation is not None:
            self.speculator = Speculator(
                self._engine,
                self._config,
                self._speculation,
                slots=self.slots,
                num_pages=num_pages,
                cache_dtype=self._cache_dtype,
            )

    def restart(self) -> None:
        """Empty slots and pages, after a step that failed: what it took may be gone."""
        for name in ("_pages", "_state", "_book", "speculator"):
            self.__dict__.pop(name, None)  # so that there is room for new ones
        self._start(self.num_pages)

    @property
    def sizes(self) -> StepSizes:
        """What programs are compiled for."""
        return self._programs.sizes

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return self._num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        drafts = self.speculator.page_bytes if self.speculator is not None else 0
        return self._programs.page_bytes + drafts

    def resize(self, num_pages: int) -> None:
        """Grow or shrink every part's pool; pages beyond a smaller one are gone."""
        for size in self.sizes.pools_between(self.num_pages, num_pages):
            self._pages, self._num_pages = self._programs.resize(size)(self._pages), size
            if self.speculator is not None:
                self.speculator.resize(size)

    def copy_pages(self, sources: Ints, targets: Ints) -> None:
        """Copy pages ``[D, n]``; a target beyond the pool is none."""
        self._pages = self._programs.copy(self._pages, sources, targets)
        if self.speculator is not None:
            self.speculator.copy(sources, targets)

    def run_chunks(
        self, kind: ChunkKind, layout: Layout, spans: Sequence[Span], adapters: RowAdapters | None
    ) -> tuple[jax.Array, PromptScores | None]:
        """Compute chunks of one kind, and lay their keys and values into pages.

        Returns:
            Logits ``[D b, V]`` of what follows each; and scores of their tokens, where the kind asks for them.
        """
        chunk = replace(chunk_arrays(layout, spans, kind.length), adapters=adapters)
        if not kind.earlier:
            chunk = replace(chunk, way=self._attention.of_prompts(layout.rows, kind.length))
        tables = pages_before(layout, spans, kind.earlier) if kind.earlier else None
        targets = pages_for(layout, spans, kind.length, nowhere=self.num_pages)
        earlier = None if tables is None else self._programs.gather(self._pages, tables)
        logits: jax.Array
        scores: PromptScores | None = None
        if kind.num_top is None:
            logits, keys, values = self._programs.prefill(earlier, chunk)
        else:
            asked = target_arrays(layout, spans, kind)
            logits, keys, values, scores = self._programs.prefill_scored(earlier, chunk, asked)
        self._pages = self._programs.insert(self._pages, keys, values, targets)
        if self.speculator is not None:
            self.speculator.prefill(chunk, tables, targets)
        return logits, scores

    def enter(
        self, kind: ChunkKind, layout: Layout, spans: Sequence[Span], logits: jax.Array, since: float = 0.0
    ) -> Dispatched:
        """Choose what follows the prompts that end, and let their slots know what decoding needs."""
        entering = entering_arrays(layout, spans, self._eos_ids, nobody=self.slots)
        if kind.ruled:
            masks = self._book.masks(layout, [span.request for span in spans])
            entering = replace(entering, rules=self._book.entering(layout, spans), mask=masks)
        chosen, self._state, rules = self._programs.enter(
            logits, self._state, self._book.rules if kind.ruled else None, entering
        )
        self._book.rules = rules if kind.ruled else self._book.rules
        if self.speculator is not None:
            self.speculator.enter(self._state, entering.slots, layout, spans)
        rows = [
            (span.request, part, row) for span, (part, row) in zip(spans, layout.places, strict=True) if span.chunk.last
        ]
        return Dispatched("prefill", chosen, tuple(rows), since)

    def rows(
        self,
        layout: Layout,
        slots: Ints,
        tables: Sequence[PageTables],
        most_shared: int,
        longest: int,
        *,
        ahead: Sequence[Sequence[int]] | None = None,
        adapters: RowAdapters | None = None,
    ) -> Rows:
        """The rows of a decode step and their pages, as programs take them.

        Args:
            layout: the rows.
            slots: ``[D, b]``.
            tables: of each part.
            most_shared: pages with several owners that there is room for.
            longest: tokens of the longest row, as far as the host has read them.
            ahead: the tokens of each that must follow its last one and are run as well; None where none has any.
            adapters: of each row; None where none has one.
        """
        rows = replace(decode_rows(layout, slots, tables, most_shared, ahead), adapters=adapters)
        if self.speculator is not None or ahead is not None:  # a view for two models, or for several tokens of a row
            return rows
        return replace(rows, view=self._attention.for_step(rows.view, longest))

    def choose_attention(self, kind: ChunkKind, rows: int) -> None:
        """Find out how chunks that begin their prompts are attended over the fastest, unless it is known."""
        if not kind.earlier:
            self._attention.of_prompts(rows, kind.length)

    def speculate(self, rows: Rows, step: Taking, since: float = 0.0) -> DispatchedDrafts:
        """Dispatch a step that tries drafts."""
        assert self.speculator is not None
        flags: Any = sampling_flags([request.params for request, _, _ in step])
        drafted, self._pages, self._state = self.speculator.decode(self._pages, self._state, rows, flags, step, since)
        return drafted

    def forward(self, rows: Rows) -> jax.Array:
        """Dispatch the model; logits ``[D b, V]`` of each row's next token."""
        logits: jax.Array
        logits, self._pages = self._programs.forward(self._pages, self._state, rows)
        return logits

    def choose(
        self, logits: jax.Array, rows: Rows, layout: Layout, step: Taking, since: float = 0.0, *, ruled: bool
    ) -> Dispatched:
        """Dispatch the choice of each row's next token."""
        params = [request.params for request, _, _ in step]
        mask = self._book.masks(layout, [request for request, _, _ in step]) if ruled else None
        choice = choice_arrays(layout, rows, params, mask)
        chosen, self._state, rules = self._programs.choose(
            logits, self._state, self._book.rules if ruled else None, choice
        )
        self._book.rules = rules if ruled else self._book.rules
        if self.speculator is not None:
            self.speculator.note(self._state, rows.slots)
        return Dispatched("decode", chosen, step, since)

    def shadow(self) -> Dispatcher:
        """The same with the shapes of its arrays in their place: inside ``compiling_only`` it compiles, and no more."""
        other = copy(self)
        other._state, other._pages = shapes_of((self._state, self._pages))
        other._book = copy(self._book)
        other._book.rules = shapes_of(self._book.rules)
        other.speculator = None if self.speculator is None else self.speculator.shadow()
        return other

    def make_room_for_rules(self) -> None:
        """Take the memory for the largest rules about single tokens, so that programs for them stay the same."""
        self._largest_rules = True
        self._book.make_room()

    def enter_texts(self, layout: Layout) -> None:
        """Note texts of every length for slots that nobody has: what entering requests dispatch for speculation."""
        if self.speculator is not None:
            slots = layout.ints([], fill=self.slots)
            for length in self.speculator.text_lengths:
                self.speculator.enter_texts(self._state, slots, layout.lines([], length))
