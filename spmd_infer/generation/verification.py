"""The programs of speculation, as pure functions of a model: draft, verify, and remember each slot's tokens."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_BATCH, BATCH, VOCAB, constrain
from spmd_infer.generation.kv_pages import KVPages
from spmd_infer.generation.ngrams import lookup
from spmd_infer.generation.sampling import SamplingArrays, sample
from spmd_infer.generation.slots import Slots, flat, take
from spmd_infer.generation.speculation import PromptLookup
from spmd_infer.generation.steps import Chunk, Decoder, Layers, Rows, run_chunk
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.pipeline import shared_by_stages


def remember(history: jax.Array, state: Slots, slots: jax.Array, texts: jax.Array | None) -> jax.Array:
    """Write down the token that each slot's last step chose.

    Args:
        history: ``[D, S + 1, L]`` int32, the tokens of every slot by position; donate it.
        state: the slots after that step.
        slots: ``[D, b]``, those that took part.
        texts: ``[D, b, N]`` int32, what the slots' requests begin with, where they enter; N at most L.
    """
    if texts is not None:
        history = jax.vmap(lambda all_, rows, new: all_.at[rows, : new.shape[1]].set(new))(history, slots, texts)
    lengths, tokens = take((state.lengths, state.tokens), slots)
    return _written(history, slots, lengths[..., None], tokens[..., None])


def found_drafts(options: PromptLookup, state: Slots, history: jax.Array, slots: jax.Array) -> jax.Array:
    """Drafts ``[D, b, k]`` from the texts of ``slots [D, b]``; -1 where there is none."""
    texts, lengths = take((history, state.lengths), slots)
    guess = lookup(flat(texts), flat(lengths) + 1, count=options.k, longest=options.longest, shortest=options.shortest)
    return constrain(guess.reshape(*slots.shape, options.k), ATTN_BATCH, None, None)


def verify(
    model: Decoder,
    pages: KVPages,
    state: Slots,
    history: jax.Array,
    drafts: jax.Array,
    rows: Rows,
    flags: dict[str, jax.Array],
) -> tuple[jax.Array, KVPages, Slots, jax.Array]:
    """Run each row's last token and its drafts, and choose a token after each.

    Args:
        model: the decoder.
        pages: the cache, with room for all of them; donate it.
        state: the slots; donate it.
        history: as for ``remember``; donate it.
        drafts: ``[D, b, k]`` int32; -1 for none.
        rows: which rows, and their pages; none has rules.
        flags: as for ``Choice``.

    Returns:
        ``[D, b, k + 3]`` int32: the ``k + 1`` tokens chosen, how many of them count, and how many drafts there were;
        the cache, where positions that do not count are written over later; the slots; the history.
    """
    slots = rows.slots
    last, lengths, generated = take((state.tokens, state.lengths, state.generated), slots)
    ahead = jnp.arange(drafts.shape[-1] + 1)
    tokens = jnp.concatenate((last[..., None], drafts), axis=-1)  # [D, b, T]
    x, pages = _run(model, pages, tokens, lengths[..., None] + ahead, rows)
    steps = generated[..., None] + ahead
    chosen = _sampled(model, x, replace(take(state.sampling, slots), **flags), steps)
    right = jnp.cumprod(chosen[..., :-1] == drafts, axis=-1)
    count = 1 + right.sum(axis=-1)
    newest = jnp.take_along_axis(chosen, count[..., None] - 1, axis=-1)[..., 0]
    state = state.advanced(slots, newest, lengths + count, generated + count)
    history = _written(history, slots, lengths[..., None] + 1 + ahead, chosen)
    drafted = (drafts >= 0).sum(axis=-1)
    brought = jnp.concatenate((chosen, count[..., None], drafted[..., None]), axis=-1)
    return constrain(brought, ATTN_BATCH, None, None), pages, state, history


def draft(
    model: Decoder,
    pages: KVPages,
    state: Slots,
    tokens: jax.Array,
    ahead: jax.Array,
    rows: Rows,
    flags: dict[str, jax.Array],
) -> tuple[jax.Array, KVPages]:
    """Let the smaller model say what comes next.

    Args:
        model: the smaller model.
        pages: its cache; donate it.
        state: the slots.
        tokens: ``[D, b, T]`` int32, the last of each text so far.
        ahead: scalar int32, how many drafts are among them.
        rows: as for ``verify``.
        flags: as for ``Choice``.

    Returns:
        ``[D, b, 1]`` int32, with the noise that the larger model will draw with, and the cache.
    """
    lengths, generated = take((state.lengths, state.generated), rows.slots)
    length = tokens.shape[-1]
    positions = lengths[..., None] + ahead + jnp.arange(1 - length, 1)
    x, pages = _run(model, pages, tokens, positions, rows)
    sampling = replace(take(state.sampling, rows.slots), **flags)
    chosen = _sampled(model, x[:, :, -1:], sampling, generated[..., None] + ahead)
    return constrain(chosen, ATTN_BATCH, None, None), pages


def newest(history: jax.Array, state: Slots, slots: jax.Array) -> jax.Array:
    """The last two tokens ``[D, b, 2]`` of each text: a step whose drafts were all right has not run the first."""
    texts, lengths = take((history, state.lengths), slots)
    return jnp.take_along_axis(texts, lengths[..., None] + jnp.arange(-1, 1), axis=-1)


def draft_chunk(
    model: Decoder, earlier: tuple[Layers, Layers] | None, chunk: Chunk, *, fmt: CacheFormat
) -> tuple[Layers, Layers]:
    """Keys and values ``[D b, T, K, H]`` of each of the smaller model's layers; see ``steps.prefill``."""
    _, keys, values = run_chunk(model, earlier, chunk, fmt)
    return keys, values


def _run(
    model: Decoder, pages: KVPages, tokens: jax.Array, positions: jax.Array, rows: Rows
) -> tuple[jax.Array, KVPages]:
    """States ``[D, b, T, D]`` of ``tokens [D, b, T]``, written up to the last of ``positions``."""
    view = shared_by_stages(model.layers, replace(rows.view, limits=rows.view.limits * (positions[..., -1] + 1)))
    if rows.adapters is not None:
        rows.adapters.onto(model)
    x, done = model.hidden(flat(jnp.maximum(tokens, 0)), flat(positions), pages.layers(view))
    return x.reshape(*tokens.shape, -1), pages.updated(done)


def _sampled(model: Decoder, x: jax.Array, sampling: SamplingArrays, steps: jax.Array) -> jax.Array:
    """Tokens for ``steps [D, b, T]`` after states ``x [D, b, T, E]``, by the parameters ``[D, b]`` of each row."""
    logits = constrain(model.logits(x.reshape(-1, x.shape[-1])), BATCH, VOCAB)
    each = jax.tree.map(lambda x: x if x.ndim == 0 else jnp.repeat(x, steps.shape[-1], axis=1), sampling)
    chosen = sample(logits, flat(each), steps.reshape(-1))
    return constrain(chosen.reshape(steps.shape), ATTN_BATCH, None, None)


def _written(history: jax.Array, slots: jax.Array, positions: jax.Array, tokens: jax.Array) -> jax.Array:
    """``history`` with ``tokens [D, b, T]`` at ``positions [D, b, T]`` of ``slots [D, b]``."""

    def put(texts: jax.Array, rows: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
        return texts.at[rows[:, None], places].set(new, mode="drop", wrap_negative_indices=False)

    written: jax.Array = jax.vmap(put)(history, slots, positions, tokens)
    return constrain(written, ATTN_BATCH, None, None)
