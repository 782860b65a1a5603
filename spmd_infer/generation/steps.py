"""The programs of generation, as pure functions of the model: run chunks of prompts or one token more, then choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, BATCH, VOCAB, constrain
from spmd_infer.generation.cache import CacheSizes
from spmd_infer.generation.kv_pages import KVPages
from spmd_infer.generation.prompt_scores import PromptScores, Targets, score_chunk
from spmd_infer.generation.sampling import SamplingArrays, sample, sample_by_rules
from spmd_infer.generation.sampling_params import MAX_LOGPROBS
from spmd_infer.generation.slots import SlotRules, Slots, flat, put, take
from spmd_infer.models.adapters import RowAdapters
from spmd_infer.models.attention import LayerCache
from spmd_infer.models.cache_formats import CacheFormat, Packed
from spmd_infer.models.chunk_attention import ChunkCache
from spmd_infer.models.page_view import PageView
from spmd_infer.models.pipeline import kept_layers, shared_by_stages
from spmd_infer.models.prompt_attention import XLA

Cache = TypeVar("Cache", bound=LayerCache)
Layers = tuple[Packed, ...]


class Decoder(Protocol):
    """What generation asks of a model; ``Llama`` documents each method."""

    @property
    def config(self) -> CacheSizes:
        """Sizes of the model."""

    @property
    def layers(self) -> Any:
        """Its layers: a list, or ``Stages``."""

    def hidden(
        self, input_ids: jax.Array, positions: jax.Array, caches: Sequence[Cache] = ()
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """States before the head, and the caches with the new positions."""

    def logits(self, x: jax.Array) -> jax.Array:
        """Scores of every token."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chosen:
    """The tokens of a step, one for each row of each part.

    Attributes:
        tokens: ``[D, b]`` int32; -1 where no token was allowed.
        logprobs: ``[D, b]`` float32; None where no row of the step has rules, as the two below.
        top_ids: ``[D, b, N]`` int32.
        top_logprobs: ``[D, b, N]`` float32.
    """

    tokens: jax.Array
    logprobs: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """Parts of prompts that are run together, ``b`` in each of ``D`` parts of the rows.

    Attributes:
        input_ids: ``[D, b, T]`` int32, padded on the right.
        starts: ``[D, b]`` int32, where each begins in its prompt.
        counts: ``[D, b]`` int32, tokens of each; 0 for a row that only fills up.
        way: how chunks that begin their prompts are attended over, one of ``prompt_attention.PROMPT_WAYS``.
        adapters: the adapter of each; None where no row has one.
    """

    input_ids: jax.Array
    starts: jax.Array
    counts: jax.Array
    way: str = field(default=XLA, metadata={"static": True})
    adapters: RowAdapters | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entering:
    """The rows of a chunk whose prompts may end with it: what their slots are to know.

    Attributes:
        slots: ``[D, b]`` int32; the last slot for a row that only fills up.
        lengths: ``[D, b]`` int32, positions computed.
        generated: ``[D, b]`` int32, tokens that the request has chosen before: of one that is run again, some are
            part of the prompt now.
        sampling: parameters of each, ``[D, b, ...]``.
        rules: rules of each and the tokens seen before, ``[D, b, ...]``; None where no row has any.
        mask: ``[D, b, V / 32]`` uint32, tokens that may be chosen; None where ``rules`` is.
    """

    slots: jax.Array
    lengths: jax.Array
    generated: jax.Array
    sampling: SamplingArrays
    rules: SlotRules | None
    mask: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The rows of a decode step as the model runs them, ``b`` in each of ``D`` parts.

    Attributes:
        slots: ``[D, b]`` int32; the last slot for a row that only fills up.
        view: which pages they use; its ``limits`` are 1 for rows that run and 0 for those that only fill up.
        ahead: ``[D, b, N]`` int32, tokens that follow the last one of each row and are run with it; -1 behind them.
            None where no row has any.
        adapters: as for ``Chunk``.
    """

    slots: jax.Array
    view: PageView
    ahead: jax.Array | None = None
    adapters: RowAdapters | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Choice:
    """The rows of a decode step as their next tokens are chosen.

    Attributes:
        slots: as for ``Rows``.
        flags: what sampling may skip, the scalars of ``SamplingArrays`` by name.
        ruled: ``[D, b]`` bool, which rows have rules; None where no row has.
        rule_flags: the flags of ``TokenRules``; None likewise.
        mask: as for ``Entering``.
        ahead: as for ``Rows``; the token that is chosen follows them.
    """

    slots: jax.Array
    flags: dict[str, jax.Array]
    ruled: jax.Array | None
    rule_flags: dict[str, jax.Array] | None
    mask: jax.Array | None
    ahead: jax.Array | None = None


def prefill(
    model: Decoder, earlier: tuple[Layers, Layers] | None, chunk: Chunk, *, fmt: CacheFormat
) -> tuple[jax.Array, Layers, Layers]:
    """Run a chunk of prompts.

    Args:
        model: the decoder.
        earlier: pages of keys and values before the chunk as ``KVPages.gathered`` gives them; None where every row
            starts at 0.
        chunk: the rows.
        fmt: what the cache holds.

    Returns:
        Logits ``[D b, V]`` of the token that follows each, of no use where the prompt goes on after the chunk; keys and
        values ``[D b, T, K, H]`` of each layer.
    """
    x, keys, values = run_chunk(model, earlier, chunk, fmt)
    return _last_logits(model, x, chunk), keys, values


def prefill_scored(
    model: Decoder, earlier: tuple[Layers, Layers] | None, chunk: Chunk, targets: Targets, *, fmt: CacheFormat
) -> tuple[jax.Array, Layers, Layers, PromptScores]:
    """As ``prefill``, and scores of the chunk's tokens."""
    x, keys, values = run_chunk(model, earlier, chunk, fmt)
    return _last_logits(model, x, chunk), keys, values, score_chunk(model.logits, x, targets)


def _last_logits(model: Decoder, x: jax.Array, chunk: Chunk) -> jax.Array:
    last = jnp.maximum(flat(chunk.counts) - 1, 0)
    last = jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]  # [B, D]
    return constrain(model.logits(last), BATCH, VOCAB)


def enter(
    model: Decoder, logits: jax.Array, state: Slots, rules: SlotRules | None, entering: Entering
) -> tuple[Chosen, Slots, SlotRules | None]:
    """Choose the token that follows each prompt, and note in its slot what decoding needs to know.

    Args:
        model: not asked.
        logits: ``[D b, V]`` from ``prefill``.
        state: the slots; donate it.
        rules: the slots' rules; donate it. None where no row has any.
        entering: the rows.

    Returns:
        What was chosen, the slots and their rules.
    """
    del model
    if rules is not None and entering.rules is not None:
        rules = put(rules, entering.slots, entering.rules)
    chosen, rules = _choose(
        logits, entering.slots, entering.sampling, entering.generated, rules, entering.rules, entering.mask
    )
    state = state.advanced(entering.slots, chosen.tokens, entering.lengths, entering.generated + 1)
    return chosen, replace(state, sampling=put(state.sampling, entering.slots, entering.sampling)), rules


def run_chunk(
    model: Decoder, earlier: tuple[Layers, Layers] | None, chunk: Chunk, fmt: CacheFormat
) -> tuple[jax.Array, Layers, Layers]:
    """States ``[D b, T, E]`` of a chunk, and keys and values of each layer; see ``prefill``."""
    starts = flat(chunk.starts)
    positions = starts[:, None] + jnp.arange(chunk.input_ids.shape[-1])
    begins, used = shared_by_stages(model.layers, (starts, flat(chunk.counts) > 0))
    before = list(zip(*earlier, strict=True)) if earlier is not None else [None] * kept_layers(model.layers)
    caches = [ChunkCache(begins, fmt, pages, chunk.way, used=used) for pages in before]
    if chunk.adapters is not None:
        chunk.adapters.onto(model)
    x, done = model.hidden(flat(chunk.input_ids), positions, caches)
    keys = tuple(cache.keys for cache in done if cache.keys is not None)
    values = tuple(cache.values for cache in done if cache.values is not None)
    return x, keys, values


def forward(model: Decoder, pages: KVPages, state: Slots, rows: Rows) -> tuple[jax.Array, KVPages]:
    """Run each row's last token, and those that are known to follow it.

    Apart from the choice of the next one, so that a program of the model is needed for each size of the pool but none
    for each way of choosing; and so that the host can make masks meanwhile.

    Args:
        model: the decoder.
        pages: the cache; donate it.
        state: the slots.
        rows: which rows, and their pages.

    Returns:
        Logits ``[D b, V]`` of each row's next token, and the cache with the positions of the tokens that were run.
    """
    lengths, last = take((state.lengths, state.tokens), rows.slots)
    known = _known(rows.ahead)
    view = shared_by_stages(model.layers, replace(rows.view, limits=rows.view.limits * (lengths + 1 + known)))
    if rows.adapters is not None:
        rows.adapters.onto(model)
    tokens = last[..., None] if rows.ahead is None else jnp.concatenate((last[..., None], rows.ahead), axis=-1)
    positions = lengths[..., None] + jnp.arange(tokens.shape[-1])
    # -1 where there is none, and in a row that ended for want of a token
    x, done = model.hidden(flat(jnp.maximum(tokens, 0)), flat(positions), pages.layers(view))
    newest = x[:, 0] if rows.ahead is None else jnp.take_along_axis(x, flat(known)[:, None, None], axis=1)[:, 0]
    logits = constrain(model.logits(newest), BATCH, VOCAB)
    return logits, pages.updated(done)


def choose(
    model: Decoder, logits: jax.Array, state: Slots, rules: SlotRules | None, choice: Choice
) -> tuple[Chosen, Slots, SlotRules | None]:
    """Choose each row's next token.

    Args:
        model: not asked.
        logits: ``[D b, V]`` from ``forward``.
        state: the slots; donate it.
        rules: the slots' rules; donate it. None where no row has any.
        choice: the rows.

    Returns:
        What was chosen, the slots and their rules.
    """
    del model
    lengths, generated = take((state.lengths, state.generated), choice.slots)
    known = _known(choice.ahead)
    lengths, generated = lengths + known, generated + known
    if choice.ahead is not None and rules is not None:
        for index in range(choice.ahead.shape[-1]):
            rules = rules.counted(choice.slots, choice.ahead[..., index])
    sampling = replace(take(state.sampling, choice.slots), **choice.flags)
    own = None
    if rules is not None and choice.rule_flags is not None and choice.ruled is not None:
        own = take(rules, choice.slots).only(choice.ruled)
        own = replace(own, rules=replace(own.rules, **choice.rule_flags))
    chosen, rules = _choose(logits, choice.slots, sampling, generated, rules, own, choice.mask)
    return chosen, state.advanced(choice.slots, chosen.tokens, lengths + 1, generated + 1), rules


def _choose(
    logits: jax.Array,
    slots: jax.Array,
    sampling: SamplingArrays,
    generated: jax.Array,
    rules: SlotRules | None,
    own: SlotRules | None,
    mask: jax.Array | None,
) -> tuple[Chosen, SlotRules | None]:
    """A token for each row ``[D, b]`` from ``logits [D b, V]``; ``own`` are the rules of the rows, ``rules`` of all."""
    logits = constrain(logits, BATCH, VOCAB)
    if rules is None or own is None or mask is None:
        tokens = sample(logits, flat(sampling), flat(generated))
        return Chosen(constrain(tokens.reshape(slots.shape), ATTN_BATCH, None)), rules
    found = sample_by_rules(
        logits, flat(sampling), flat(generated), flat(own.rules), flat(own.seen), flat(mask), num_top=MAX_LOGPROBS
    )
    chosen = Chosen(*(constrain(x.reshape(*slots.shape, *x.shape[1:]), *_axes(x.ndim + 1)) for x in found))
    return chosen, rules.counted(slots, chosen.tokens)


def _known(ahead: jax.Array | None) -> jax.Array:
    """How many tokens of each row ``[D, b]`` are run besides its last; one 0 for all where none are."""
    return jnp.int32(0) if ahead is None else (ahead >= 0).sum(axis=-1, dtype=jnp.int32)


def _axes(rank: int) -> tuple[str | None, ...]:
    return (ATTN_BATCH, *(None,) * (rank - 1))
