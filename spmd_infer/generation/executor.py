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
import numpy as np
import numpy.typing as npt

from spmd_infer.generation.batches import Layout, page_arrays
from spmd_infer.generation.cache import cache_dtype
from spmd_infer.generation.constraints import fill_masks
from spmd_infer.generation.dispatched import Dispatched, DispatchedDrafts, Taking
from spmd_infer.generation.kv_pages import PAGE_SIZE, KVPages, page_bytes, pages_axes
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling import SamplingArrays, sampling_arrays, sampling_flags
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.generation.slots import SlotRules, Slots, empty_slots, slot_axes
from spmd_infer.generation.speculation import Speculation
from spmd_infer.generation.speculator import Speculator
from spmd_infer.generation.step_plan import PrefillChunk
from spmd_infer.generation.steps import Chunk, Rows, choose, decode, forward, prefill
from spmd_infer.generation.token_rules import RuleWidths, TokenRules, rule_arrays, rule_flags
from spmd_infer.generation.token_state import TokenState, token_state
from spmd_infer.models.paged_attention import PageView

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

MOST_STOPS = 8
"""End and stop tokens of a request with ``min_tokens``, at most."""

_NOBODY = SamplingParams()

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
        speculation: where drafts come from; None for none.
    """

    def __init__(
        self,
        engine: Engine,
        config: Any,
        eos_ids: Collection[int],
        *,
        slots: int,
        num_pages: int,
        speculation: Speculation | None = None,
    ) -> None:
        self._engine, self._config, self._eos_ids = engine, config, frozenset(eos_ids)
        self._parts, self._slots = engine.data_parts, slots
        self.dtype = cache_dtype(engine.mesh.devices.flat[0].platform, jnp.result_type(engine.dtype, jnp.bfloat16))
        self._words = -(-config.vocab_size // 32)
        rows = SamplingArrays(**sampling_arrays([], eos_ids, most_stops=MOST_STOPS))  # type: ignore[arg-type]  # numpy
        self._state = self._run_now("slots", lambda _: self._empty_state(rows))
        self._rules: SlotRules | None = None
        self._widths = RuleWidths(biases=0, bad_words=0)
        axes = pages_axes(config)
        jit = partial(engine.jit, phase="decode")
        self._pages: KVPages = self._zeros(num_pages)
        self._insert = jit("insert", lambda _, pages, *new: pages.inserted(*new), donate=(0,), out_axes=axes)
        self._copy = jit("copy", lambda _, pages, *which: pages.copied(*which), donate=(0,), out_axes=axes)
        self._gather = jit("gather", lambda _, pages, tables: pages.gathered(tables))
        self._prefill = engine.jit("prefill", prefill, donate=(0, 1), phase="prefill")
        self._decode = jit("decode", decode, donate=(0, 1, 2))
        self._forward = jit("forward", forward, donate=(0,))
        self._choose = jit("choose", choose, donate=(1, 2))
        self._row_buckets: dict[str, list[int]] = {}
        self._speculator: Speculator | None = None
        if speculation is not None:
            self._speculator = Speculator(engine, config, speculation, slots=slots, num_pages=num_pages)

    @property
    def num_pages(self) -> int:
        """Pages of each part."""
        return self._pages.num_pages

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        drafts = self._speculator.page_bytes if self._speculator is not None else 0
        return page_bytes(self._config, self.dtype) + drafts

    def resize(self, num_pages: int, moves: Sequence[tuple[int, int, int]]) -> None:
        """Grow or shrink every part's pool, after moving pages ``(part, source, destination)``."""
        self.copy(moves)
        resized = self._engine.jit(
            f"resize_{num_pages}",
            lambda _, pages: pages.resized(num_pages),
            phase="decode",
            out_axes=pages_axes(self._config),
        )
        self._pages = resized(self._pages)
        if self._speculator is not None:
            self._speculator.resize(num_pages)

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Copy pages ``(part, source, destination)``, all at once."""
        if not copies:
            return
        layout = Layout.of([part for part, _, _ in copies], self._parts, _power_of_two)
        sources = layout.ints([source for _, source, _ in copies])
        targets = layout.ints([target for _, _, target in copies], fill=self.num_pages)
        self._pages = self._copy(self._pages, sources, targets)
        if self._speculator is not None:
            self._speculator.copy(sources, targets)

    def prefill(self, chunks: Sequence[PrefillChunk], requests: Sequence[Request]) -> list[Dispatched]:
        """Run chunks of prompts; those of near lengths together.

        Args:
            chunks: from the step's plan.
            requests: whose each is.

        Returns:
            The first tokens of the requests whose prompts end here.
        """
        spans = [_Span.of(chunk, request) for chunk, request in zip(chunks, requests, strict=True)]
        kinds: dict[tuple[int, int, bool], list[_Span]] = {}
        for span in spans:
            kinds.setdefault(span.kind, []).append(span)
        return [found for kind, group in kinds.items() if (found := self._prefill_group(group, *kind)) is not None]

    def _prefill_group(self, spans: Sequence[_Span], length: int, earlier: int, ruled: bool) -> Dispatched | None:
        sequences = [span.chunk.sequence for span in spans]
        layout = Layout.of(
            [s.part for s in sequences], self._parts, partial(self._bucket, f"prefill_{length}_{earlier}")
        )
        slots = layout.ints([s.slot or 0 for s in sequences], fill=self._slots)
        requests = [span.request for span in spans]
        sampling = sampling_arrays([*(r.params for r in requests), _NOBODY], self._eos_ids, most_stops=MOST_STOPS)
        chunk = Chunk(
            input_ids=layout.lines([span.tokens for span in spans], length),  # type: ignore[arg-type]  # numpy, as below
            slots=slots,  # type: ignore[arg-type]
            starts=layout.ints([span.start for span in spans]),  # type: ignore[arg-type]
            counts=layout.ints([len(span.tokens) for span in spans], fill=1),  # type: ignore[arg-type]
            generated=layout.ints([s.outputs for s in sequences]),  # type: ignore[arg-type]
            sampling=SamplingArrays(**_spread(layout, sampling)),
            rules=self._entering(layout, spans) if ruled else None,
            mask=self._masks(layout, requests) if ruled else None,
        )
        pages = tables = None
        if earlier:
            tables = layout.lines(
                [s.pages[: span.start // PAGE_SIZE] for s, span in zip(sequences, spans, strict=True)], earlier
            )
            pages = self._gather(self._pages, tables)
        state, rules = self._moved((self._state, self._rules if ruled else None), "decode", "prefill")
        chosen, keys, values, state, rules = self._prefill(state, rules, pages, chunk)
        self._state, rules = self._moved((state, rules), "prefill", "decode")
        self._rules = rules if ruled else self._rules
        targets = layout.lines(
            [
                s.pages[span.start // PAGE_SIZE :][: length // PAGE_SIZE]
                for s, span in zip(sequences, spans, strict=True)
            ],
            length // PAGE_SIZE,
            fill=self.num_pages,
        )
        self._pages = self._insert(self._pages, keys, values, targets)
        if self._speculator is not None:
            self._speculator.prefill(chunk, tables, targets)
            if any(span.chunk.last for span in spans):
                ending = [s.slot if span.chunk.last else None for s, span in zip(sequences, spans, strict=True)]
                self._speculator.enter(self._state, layout, ending, [s.tokens for s in sequences])
        rows = [
            (span.request, part, row) for span, (part, row) in zip(spans, layout.places, strict=True) if span.chunk.last
        ]
        return Dispatched("prefill", chosen, tuple(rows)) if rows else None

    def decode(self, entries: Sequence[Entry], tables: Sequence[PageTables]) -> Pending:
        """Dispatch one token more of each entry.

        Args:
            entries: those that run.
            tables: of each part.

        Returns:
            The step; where a request needs a mask, its choice waits for ``Pending.finish``.
        """
        layout = Layout.of([part for _, part, _ in entries], self._parts, partial(self._bucket, "decode"))
        slots = layout.ints([slot for _, _, slot in entries], fill=self._slots)
        requests = [request for request, _, _ in entries]
        params = [request.params for request in requests]
        ruled = any(p.needs_rules for p in params)
        rows = Rows(
            slots=slots,  # type: ignore[arg-type]  # numpy, as below
            view=PageView(**vars(page_arrays(layout, slots, tables))),
            flags=sampling_flags(params),  # type: ignore[arg-type]
            ruled=layout.ints([p.needs_rules for p in params]) > 0 if ruled else None,  # type: ignore[arg-type]
            rule_flags=rule_flags(params) if ruled else None,  # type: ignore[arg-type]
            mask=None,
        )
        step = tuple((request, part, row) for request, (part, row) in zip(requests, layout.places, strict=True))
        if self._speculator is not None and not ruled and self._speculator.pace.wants(len(entries)):
            drafted, self._pages, self._state = self._speculator.decode(self._pages, self._state, rows, step)
            return Pending(lambda: drafted)
        if any(request.constraint is not None for request in requests):
            logits, self._pages = self._forward(self._pages, self._state, rows)
            return Pending(lambda: self._finish(logits, rows, layout, step))
        if ruled:
            rows = replace(rows, mask=self._masks(layout, requests))
        chosen, self._pages, self._state, rules = self._decode(
            self._pages, self._state, self._rules if ruled else None, rows
        )
        self._rules = rules if ruled else self._rules
        self._note(rows)
        done = Dispatched("decode", chosen, step)
        return Pending(lambda: done)

    def _note(self, rows: Rows) -> None:
        if self._speculator is not None:
            self._speculator.note(self._state, rows.slots)

    def _finish(self, logits: jax.Array, rows: Rows, layout: Layout, step: Taking) -> Dispatched:
        rows = replace(rows, mask=self._masks(layout, [request for request, _, _ in step]))
        chosen, self._state, self._rules = self._choose(logits, self._state, self._rules, rows)
        self._note(rows)
        return Dispatched("decode", chosen, step)

    def _entering(self, layout: Layout, spans: Sequence[_Span]) -> SlotRules:
        """The rules of requests that enter, after making room for them in every slot."""
        requests = [span.request for span in spans]
        params = [*(r.params for r in requests), _NOBODY]
        words = [*(r.bad_words for r in requests), ()]
        need = RuleWidths.fitting(params, words)
        widths = RuleWidths(max(need.biases, self._widths.biases), max(need.bad_words, self._widths.bad_words))
        prompts = [*(span.chunk.sequence.tokens[: span.chunk.sequence.prompt_len] for span in spans), []]
        outputs = [*(span.chunk.sequence.tokens[span.chunk.sequence.prompt_len :] for span in spans), []]
        rules = rule_arrays(params, words, widths)
        seen = token_state(prompts, outputs, self._config.vocab_size)
        if self._rules is None or widths != self._widths:
            self._grow_rules(rules, seen, widths)
        return SlotRules(TokenRules(**_spread(layout, rules)), TokenState(**_spread(layout, seen)))

    def _grow_rules(self, rules: dict[str, Any], seen: dict[str, Any], widths: RuleWidths) -> None:
        """Room for rules of these widths in every slot; what slots hold already stays."""
        shown = SlotRules(TokenRules(**rules), TokenState(**seen))
        empty = self._run_now(f"rules_{widths}", lambda _: empty_slots(shown, self._parts, self._slots))
        if self._rules is not None:

            def widen(new: jax.Array, old: jax.Array) -> jax.Array:
                fill = -1 if old.dtype == jnp.int32 else 0
                return jnp.pad(
                    old, [(0, n - o) for n, o in zip(new.shape, old.shape, strict=True)], constant_values=fill
                )

            empty = jax.tree.map(widen, empty, self._rules)
        self._rules, self._widths = empty, widths

    def _masks(self, layout: Layout, requests: Sequence[Request]) -> Any:
        lines = np.empty((len(requests) + 1, self._words), np.uint32)
        failures = fill_masks(lines, [*(request.mask_rule for request in requests), None])
        for index, error in failures.items():
            requests[index].fail(error)
        return layout.arrays(lines)

    def _bucket(self, kind: str, rows: int) -> int:
        """The rows that a program runs: the fewest that fit of those used before, unless most would be wasted."""
        known = self._row_buckets.setdefault(kind, [])
        fitting = [size for size in known if rows <= size <= 4 * rows]
        if fitting:
            return min(fitting)
        known.append(_power_of_two(rows))
        return known[-1]

    def _moved(self, tree: Any, before: str, after: str) -> Any:
        return self._engine.hand_over(tree, slot_axes(tree), before=before, after=after)

    def _empty_state(self, rows: SamplingArrays) -> Slots:
        def zeros() -> jax.Array:  # a buffer each, since each is donated
            return jnp.zeros((self._parts, self._slots + 1), jnp.int32)

        return Slots(zeros(), zeros(), zeros(), empty_slots(rows, self._parts, self._slots))

    def _zeros(self, num_pages: int) -> KVPages:
        pages: KVPages = self._engine.jit(
            f"pages_{num_pages}",
            lambda _: KVPages.zeros(self._config, self._parts, num_pages, self.dtype),
            out_axes=pages_axes(self._config),
            phase="decode",
        )()
        return pages

    def _run_now(self, name: str, make: Callable[[Any], Any]) -> Any:
        """What ``make`` gives, laid out as slots are."""
        axes = slot_axes(jax.eval_shape(make, None))
        return self._engine.jit(name, make, out_axes=axes, phase="decode")()


@dataclass(frozen=True)
class Pending:
    """A decode step whose forward pass is dispatched.

    Attributes:
        finish: dispatches the choice, once the masks of its requests are known, and gives the step.
    """

    finish: Callable[[], Dispatched | DispatchedDrafts]


@dataclass(frozen=True)
class _Span:
    """A chunk as it is run: from the start of a page."""

    chunk: PrefillChunk
    request: Request
    start: int
    tokens: Sequence[int]

    @classmethod
    def of(cls, chunk: PrefillChunk, request: Request) -> _Span:
        # Only a fork starts within a page; the page is its own by then, and its first positions are computed again.
        start = chunk.start - chunk.start % PAGE_SIZE
        return cls(chunk, request, start, chunk.sequence.tokens[start : chunk.start + chunk.length])

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What chunks of one program share: padded length, pages before (padded), whether there are rules."""
        length = max(PAGE_SIZE, _power_of_two(len(self.tokens)))
        earlier = self.start // PAGE_SIZE
        return length, _power_of_two(earlier) if earlier else 0, self.request.params.needs_rules


def _spread(layout: Layout, fields: dict[str, npt.NDArray[np.generic]]) -> dict[str, Any]:
    """Arrays of each entry and one more as ``[D, b, ...]``; scalars as they are."""
    return {name: layout.arrays(values) if values.ndim else values for name, values in fields.items()}


def _power_of_two(count: int) -> int:
    return 1 << max(0, count - 1).bit_length()
