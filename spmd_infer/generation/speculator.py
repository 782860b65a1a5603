"""The device side of speculation: the slots' texts, the smaller model with its cache, drafting and verifying."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spmd_infer.axes import ATTN_BATCH
from spmd_infer.errors import TaskError
from spmd_infer.generation.batches import Layout
from spmd_infer.generation.dispatched import DispatchedDrafts, Taking
from spmd_infer.generation.kv_pages import KVPages, pages_axes
from spmd_infer.generation.prompt_chunks import Span
from spmd_infer.generation.slots import Slots
from spmd_infer.generation.speculation import Draft, Pace, Speculation, tokens_for_free
from spmd_infer.generation.stage_pools import StagePools, of_pools
from spmd_infer.generation.step_programs import told
from spmd_infer.generation.steps import Chunk, Rows
from spmd_infer.generation.verification import draft, draft_chunk, found_drafts, newest, remember, verify
from spmd_infer.model_program import shapes_of
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.prompt_attention import XLA

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_SHORTEST_TEXT = 256
_AXES = (ATTN_BATCH, None, None)


class Speculator:
    """Drafts and verifies for one executor.

    Args:
        engine: holds the decoder.
        config: the decoder's sizes.
        speculation: where drafts come from.
        slots: sequences that run at a time in each part.
        num_pages: pages of each part to begin with.
        cache_dtype: what the smaller model's cache holds, as ``CacheFormat.of`` takes it.

    Raises:
        TaskError: the smaller model does not fit the larger one.
    """

    def __init__(
        self, engine: Engine, config: Any, speculation: Speculation, *, slots: int, num_pages: int, cache_dtype: str
    ) -> None:
        self._k = speculation.k
        self._length = config.context_len + speculation.k + 1
        jit = partial(engine.jit, phase="decode")
        shape = (engine.data_parts, slots + 1, self._length)
        self._history: jax.Array = jit(
            f"texts_{slots}_{self._length}", lambda _: jnp.zeros(shape, jnp.int32), out_axes=_AXES
        )()
        self._remember = jit("remember", lambda _, *args: remember(*args), donate=(0,), out_axes=_AXES)
        self._verify = jit("verify", told(engine, verify), donate=(0, 1, 2))
        cost = 0.0
        self._draft: DraftModel | None = None
        if isinstance(speculation, Draft):
            self._newest = jit("newest", lambda _, *args: newest(*args), out_axes=_AXES)
            self._draft = DraftModel(speculation.engine, engine, config, num_pages, cache_dtype)
            cost = speculation.k * _weight_bytes(speculation.engine) / _weight_bytes(engine)
        else:
            self._find = jit(f"find_{speculation}", lambda _, *args: found_drafts(speculation, *args), out_axes=_AXES)
        self.pace = Pace(
            self._k,
            free_rows=tokens_for_free(engine.mesh.devices.flat[0].platform),
            draft_cost=cost,
            adaptive=speculation.adaptive,
        )

    @property
    def page_bytes(self) -> int:
        """Bytes that each page takes beside the larger model's, on all devices together."""
        return self._draft.page_bytes if self._draft is not None else 0

    def enter(self, state: Slots, slots: Any, layout: Layout, spans: Sequence[Span]) -> None:
        """Note the texts of requests whose prompts have been run.

        Args:
            state: the slots after it.
            slots: ``[D, b]`` of the rows that were run; the last slot for one whose prompt goes on.
            layout: the rows.
            spans: what they ran.
        """
        texts = [span.chunk.sequence.tokens if span.chunk.last else [] for span in spans]
        length = next(size for size in self.text_lengths if size >= max(map(len, texts), default=0))
        self.enter_texts(state, slots, layout.lines(texts, length))

    def enter_texts(self, state: Slots, slots: Any, lines: Any) -> None:
        """The same with the texts as ``[D, b, N]``, filled up; N is one of ``text_lengths``."""
        self._history = self._remember(self._history, state, slots, lines)

    @property
    def text_lengths(self) -> list[int]:
        """The lengths that texts are filled up to."""
        lengths = [_SHORTEST_TEXT]
        while lengths[-1] < self._length:
            lengths.append(4 * lengths[-1])
        return [min(length, self._length) for length in lengths]

    def note(self, state: Slots, slots: Any) -> None:
        """Note what a plain step has chosen for ``slots [D, b]``."""
        self._history = self._remember(self._history, state, slots, None)

    def decode(
        self, pages: KVPages, state: Slots, rows: Rows, flags: Any, taking: Taking, since: float = 0.0
    ) -> tuple[DispatchedDrafts, KVPages, Slots]:
        """Dispatch a step that tries drafts; takes ``pages`` and ``state`` and gives new ones."""
        if self._draft is not None:
            last_two = self._newest(self._history, state, rows.slots)
            drafts = self._draft.propose(state, last_two, rows, flags, self._k)
        else:
            drafts = self._find(state, self._history, rows.slots)
        brought, pages, state, self._history = self._verify(pages, state, self._history, drafts, rows, flags)
        return DispatchedDrafts(brought, taking, self.pace, since=since), pages, state

    def prefill(self, chunk: Chunk, earlier: Any, targets: Any) -> None:
        """Run a chunk of prompts through the smaller model as well, if there is one.

        Args:
            chunk: as the larger one ran it.
            earlier: ``[D, b, M]``, the pages before it; None where it starts at 0.
            targets: the pages for it.
        """
        if self._draft is not None:
            self._draft.prefill(chunk, earlier, targets)

    def copy(self, sources: Any, targets: Any) -> None:
        """Copy the smaller model's pages too."""
        if self._draft is not None:
            self._draft.copy(sources, targets)

    def resize(self, num_pages: int) -> None:
        """Follow a pool that grew or shrank."""
        if self._draft is not None:
            self._draft.resize(num_pages)

    def shadow(self) -> Speculator:
        """See ``Dispatcher.shadow``."""
        other = copy(self)
        other._history = shapes_of(self._history)
        other._draft = None if self._draft is None else self._draft.shadow()
        return other


class DraftModel:
    """The smaller model and its cache, whose pages have the numbers of the larger one's.

    Args:
        engine: holds the smaller decoder.
        target: holds the larger one.
        config: the larger one's sizes.
        num_pages: pages of each part to begin with.
        cache_dtype: what its cache holds.

    Raises:
        TaskError: tokens, context, devices or parts are not those of the larger one.
    """

    def __init__(self, engine: Engine, target: Engine, config: Any, num_pages: int, cache_dtype: str) -> None:
        own: Any = engine.config
        if engine.family is None or engine.family.task != "generate":
            raise TaskError("a draft engine must hold a decoder of the zoo")
        for what, found, expected in (
            ("tokens", own.vocab_size, config.vocab_size),
            ("data parts", engine.data_parts, target.data_parts),
            ("devices", engine.mesh.devices.size, target.mesh.devices.size),
            ("stages", engine.stages, target.stages),
        ):
            if found != expected:
                raise TaskError(f"the draft model has {found} {what}, the model that it drafts for {expected}")
        if own.context_len < config.context_len:
            raise TaskError(
                f"the draft model's context is {own.context_len}, shorter than the {config.context_len} of the model "
                "that it drafts for"
            )
        self._engine = engine
        platform = engine.mesh.devices.flat[0].platform
        self._format = CacheFormat.of(cache_dtype, platform, jnp.result_type(engine.dtype, jnp.bfloat16))
        self._pools = pools = StagePools.of(engine, own)
        self._axes = pools.axes(pages_axes(pools.sizes, self._format))
        jit, each = partial(engine.jit, phase="decode"), pools.each
        parts = engine.data_parts
        self._pages: KVPages = jit(
            f"draft_pages_{num_pages}_{self._format.name}",
            of_pools(each(lambda: KVPages.zeros(pools.sizes, parts, num_pages, self._format))),
            out_axes=self._axes,
        )()
        self._insert = jit("draft_insert", of_pools(each(KVPages.inserted, own=3)), donate=(0,), out_axes=self._axes)
        self._copy = jit("draft_copy", of_pools(each(KVPages.copied)), donate=(0,), out_axes=self._axes)
        self._gather = jit("draft_gather", of_pools(each(KVPages.gathered)))
        self._prefill = engine.jit(
            f"draft_prefill_{self._format.name}", partial(draft_chunk, fmt=self._format), phase="prefill"
        )
        self._step = jit("draft", draft, donate=(0,))
        self._join = jit("draft_join", lambda _, *found: jnp.concatenate(found, axis=-1), out_axes=_AXES)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, on all devices together."""
        return self._pools.page_bytes(self._format)

    def propose(self, state: Slots, tokens: jax.Array, rows: Rows, flags: Any, k: int) -> jax.Array:
        """Dispatch ``k`` steps from the texts' last two tokens ``[D, b, 2]``; gives drafts ``[D, b, k]``."""
        rows = replace(rows, adapters=None)
        found = []
        for ahead in range(k):
            tokens, self._pages = self._step(self._pages, state, tokens, np.int32(ahead), rows, flags)
            found.append(tokens)
        drafts: jax.Array = self._join(*found)
        return drafts

    def prefill(self, chunk: Chunk, earlier: Any, targets: Any) -> None:
        """See ``Speculator.prefill``."""
        pages = None if earlier is None else self._gather(self._pages, earlier)
        keys, values = self._prefill(pages, replace(chunk, way=XLA, adapters=None))
        self._pages = self._insert(self._pages, keys, values, targets)

    def copy(self, sources: Any, targets: Any) -> None:
        """See ``KVPages.copied``."""
        self._pages = self._copy(self._pages, sources, targets)

    def resize(self, num_pages: int) -> None:
        """See ``KVPages.resized``."""
        resized = self._engine.jit(
            f"draft_resize_{num_pages}",
            of_pools(self._pools.each(lambda pages: pages.resized(num_pages))),
            out_axes=self._axes,
            phase="decode",
        )
        self._pages = resized(self._pages)

    def shadow(self) -> DraftModel:
        """See ``Dispatcher.shadow``."""
        other = copy(self)
        other._pages = shapes_of(self._pages)
        return other


def _weight_bytes(engine: Engine) -> int:
    return sum(weight.nbytes for weight in engine.params.values())
