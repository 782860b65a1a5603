"""Llama-family decoders (Touvron et al. 2023; Dubey et al. 2024), SmolLM2 among them.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward. Against the reference in
Hugging Face transformers: queries that share a key head are folded instead of repeating keys, softmax and norms are in
float32 whatever the weights' dtype, and generation computes logits only at the position that is sampled.

Heads over a mesh axis: query heads are split only where every device then holds whole groups with their key heads, or
shares of one group with that group's key head copied (see ``Config.axis_units``). Otherwise, as with 9 query and 3 key
heads over 4 devices, attention stays whole on each device while feed-forward and vocabulary are split: a small model
loses little by it, and no head is cut in two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from spmd_infer.axes import (
    ATTN_HEADS,
    ATTN_KV_HEADS,
    BATCH,
    EMBED,
    HEADS,
    KV_HEADS,
    MLP,
    SEQ,
    VOCAB,
    constrain,
)
from spmd_infer.errors import ModelError
from spmd_infer.models.attention import LayerCache, causal_attention
from spmd_infer.models.heads import keys_in, mixed_out, queries_in
from spmd_infer.models.layers import Embedding, Linear, RMSNorm
from spmd_infer.models.pipeline import Stages
from spmd_infer.models.platforms import computed_once
from spmd_infer.tensors import InputSpec, Source

Cache = TypeVar("Cache", bound=LayerCache)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than the pretraining's.

    Attributes:
        kind: ``linear`` (Chen et al. 2023), ``llama3`` (Dubey et al. 2024), or ``frequency_factors`` (one divisor for
            each frequency, as llama.cpp stores the latter).
        factor: how many times slower the stretched frequencies turn.
        low_freq_factor: llama3: waves longer than ``original_context_len / low_freq_factor`` are stretched in full.
        high_freq_factor: llama3: waves shorter than ``original_context_len / high_freq_factor`` are left alone.
        original_context_len: llama3: the context of the pretraining.
        factors: frequency_factors: the divisors, ``H / 2`` of them.
    """

    kind: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context_len: int = 8192
    factors: tuple[float, ...] = ()

    @classmethod
    def from_hf(cls, scaling: Mapping[str, Any] | None) -> RopeScaling | None:
        """Read ``rope_scaling`` or ``rope_parameters`` of a Hugging Face config; None where nothing is stretched.

        Raises:
            ModelError: a kind of scaling that is not implemented.
        """
        kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
        if scaling is None or kind == "default":
            return None
        if kind == "linear":
            return cls(kind, float(scaling["factor"]))
        if kind == "llama3":
            return cls(
                kind,
                float(scaling["factor"]),
                float(scaling["low_freq_factor"]),
                float(scaling["high_freq_factor"]),
                int(scaling["original_max_position_embeddings"]),
            )
        if kind == "frequency_factors":
            return cls(kind, factors=tuple(float(factor) for factor in scaling["factors"]))
        raise ModelError(f"rope scaling of kind {kind!r} is not implemented; known are default, linear and llama3")


@dataclass(frozen=True)
class Config:
    """Sizes of a Llama-family decoder."""

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_len: int
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ModelError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} key heads evenly")
        if self.head_dim % 2:
            raise ModelError(f"rotary positions need an even head dimension, not {self.head_dim}")
        factors = self.rope_scaling.factors if self.rope_scaling is not None else ()
        if factors and len(factors) != self.head_dim // 2:
            raise ModelError(f"{len(factors)} rope frequency factors for {self.head_dim // 2} frequencies")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read a Hugging Face ``config.json``.

        Raises:
            ModelError: a key is missing, or asks for what this family does not do.
        """
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise ModelError(f"the Llama family's feed-forward uses silu, not {activation!r}")
        rope = config.get("rope_parameters") or {}
        try:
            num_heads = int(config["num_attention_heads"])
            embed_dim = int(config["hidden_size"])
            return cls(
                vocab_size=int(config["vocab_size"]),
                embed_dim=embed_dim,
                mlp_dim=int(config["intermediate_size"]),
                num_layers=int(config["num_hidden_layers"]),
                num_heads=num_heads,
                num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
                head_dim=int(config.get("head_dim") or embed_dim // num_heads),
                context_len=int(config.get("max_position_embeddings", 2048)),
                norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
                rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
                rope_scaling=RopeScaling.from_hf(config.get("rope_scaling") or rope or None),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                attention_bias=bool(config.get("attention_bias", False)),
                mlp_bias=bool(config.get("mlp_bias", False)),
            )
        except KeyError as error:
            raise ModelError(f"the configuration of a Llama-family model needs {error.args[0]!r}") from error

    def axis_units(self) -> Mapping[str, int]:
        """Query heads split into as many parts as keep every part with the key heads that it reads.

        A split into m parts does so if m divides the key heads (whole groups), or the key heads divide m (shares of a
        group, the key head copied). The units are the most query heads for which that holds of every divisor.
        """
        kv = self.num_kv_heads
        fitting = [
            units
            for units in range(kv, self.num_heads + 1, kv)
            if self.num_heads % units == 0
            and all(kv % m == 0 or m % kv == 0 for m in range(1, units + 1) if units % m == 0)
        ]
        return {HEADS: max(fitting), ATTN_HEADS: max(fitting), KV_HEADS: kv, ATTN_KV_HEADS: kv}


def input_spec(config: Config) -> dict[str, InputSpec]:
    """Token ids ``[B, T]``; rows may be padded on the right with any token."""
    return {"input_ids": InputSpec((BATCH, SEQ), np.int32)}


def rope_frequencies(config: Config) -> npt.NDArray[np.float32]:
    """Radians per position of each pair of a head's dimensions, ``[H / 2]`` (Su et al. 2021)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies: npt.NDArray[np.float64] = config.rope_theta**-exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies.astype(np.float32)
    if scaling.kind == "frequency_factors":
        return (frequencies / np.array(scaling.factors, np.float64)).astype(np.float32)
    if scaling.kind == "linear":
        return (frequencies / scaling.factor).astype(np.float32)
    turns = scaling.original_context_len * frequencies / (2 * math.pi)  # of each wave within the pretraining's context
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = np.clip(kept, 0.0, 1.0)
    return (frequencies * (kept + (1.0 - kept) / scaling.factor)).astype(np.float32)


def _rotate(x: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turn ``x [B, T, N, H]`` by the angles whose ``cosine`` and ``sine`` are ``[B, T, 1, H / 2]``."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cosine - second * sine, second * cosine + first * sine), axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, bias = config.embed_dim, config.attention_bias
        query_dim, kv_dim = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = Linear(width, query_dim, axes=(HEADS, EMBED), use_bias=bias, rngs=rngs)
        self.k_proj = Linear(width, kv_dim, axes=(KV_HEADS, EMBED), use_bias=bias, rngs=rngs)
        self.v_proj = Linear(width, kv_dim, axes=(KV_HEADS, EMBED), use_bias=bias, rngs=rngs)
        self.o_proj = Linear(query_dim, width, axes=(EMBED, HEADS), use_bias=bias, rngs=rngs)
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Mix ``x [B, T, D]``; see ``Llama.hidden`` for what the cache does."""
        batch, length, _ = x.shape
        queries = _rotate(self.q_proj(x).reshape(batch, length, -1, self.head_dim), *angles)  # [B, T, N, H]
        keys = _rotate(self.k_proj(x).reshape(batch, length, -1, self.head_dim), *angles)  # [B, T, K, H]
        values = self.v_proj(x).reshape(batch, length, -1, self.head_dim)
        queries, keys, values = queries_in(queries), keys_in(keys), keys_in(values)
        if cache is None:
            mixed = causal_attention(queries, keys, values)
        else:
            mixed, cache = cache.attend(queries, keys, values, positions)
        return self.o_proj(mixed_out(mixed).reshape(batch, length, -1)), cache


class FeedForward(nnx.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        width, hidden, bias = config.embed_dim, config.mlp_dim, config.mlp_bias
        self.gate_proj = Linear(width, hidden, axes=(MLP, EMBED), use_bias=bias, rngs=rngs)
        self.up_proj = Linear(width, hidden, axes=(MLP, EMBED), use_bias=bias, rngs=rngs)
        self.down_proj = Linear(hidden, width, axes=(EMBED, MLP), use_bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform each position of ``x [B, T, D]``."""
        hidden = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)  # [B, T, F]
        return self.down_proj(constrain(hidden, BATCH, SEQ, MLP))


class Block(nnx.Module):
    """Attention and feed-forward, each behind a norm and around a residual."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.input_layernorm = RMSNorm(config.embed_dim, axes=(EMBED,), epsilon=config.norm_epsilon)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = RMSNorm(config.embed_dim, axes=(EMBED,), epsilon=config.norm_epsilon)
        self.mlp = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], positions: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Transform ``x [B, T, D]``."""
        mixed, cache = self.self_attn(self.input_layernorm(x), angles, positions, cache)
        x = constrain(x + mixed, BATCH, SEQ, EMBED)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, BATCH, SEQ, EMBED), cache


class Llama(nnx.Module):
    """A decoder with its language-model head."""

    pipelined_layers = "layers"

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        table = partial(Embedding, config.vocab_size, config.embed_dim, axes=(VOCAB, EMBED), rngs=rngs)
        self.embed_tokens = table(attends=config.tie_embeddings)
        self.layers = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, axes=(EMBED,), epsilon=config.norm_epsilon)
        self.lm_head = None if config.tie_embeddings else table(attends=True)
        self.config = config

    def __call__(self, input_ids: jax.Array, positions: jax.Array | None = None) -> jax.Array:
        """Scores of every next token.

        Args:
            input_ids: ``[B, T]`` integers. Rows shorter than T are padded on the right with any token; scores at the
                positions before the padding do not depend on it.
            positions: ``[B, T]`` integers for the rotary embedding; 0 to T-1 if not given.

        Returns:
            ``[B, T, V]`` float32 logits.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return self.logits(self.hidden(input_ids, positions)[0])

    def prefill(
        self, input_ids: jax.Array, lengths: jax.Array, caches: Sequence[Cache]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Run whole prompts and keep their keys and values.

        Args:
            input_ids: ``[B, T]`` integers, rows padded on the right.
            lengths: ``[B]`` tokens in each row, at least 1.
            caches: one for each layer, with room for T positions; what they hold is replaced.

        Returns:
            ``[B, V]`` float32 logits at each row's last token, and the caches.
        """
        positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        x, caches = self.hidden(input_ids, positions, caches)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]  # [B, D]
        return self.logits(last), caches

    def decode(
        self, tokens: jax.Array, positions: jax.Array, caches: Sequence[Cache]
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Run one token more of each row.

        Args:
            tokens: ``[B]`` integers.
            positions: ``[B]`` the position of each token, which is the number of tokens before it in its row.
            caches: one for each layer, holding the keys and values of the earlier positions.

        Returns:
            ``[B, V]`` float32 logits, and the caches.
        """
        x, caches = self.hidden(tokens[:, None], positions[:, None], caches)
        return self.logits(x[:, 0]), caches

    def hidden(
        self, input_ids: jax.Array, positions: jax.Array, caches: Sequence[Cache] = ()
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """The normed states ``[B, T, D]`` before the head.

        With caches, the tokens' keys and values are kept at ``positions`` and the earlier ones are attended over. There
        is one for each layer, or of layers spread over stages one for each place in a stage (``Stages.keeping``).
        """
        x = constrain(self.embed_tokens(input_ids), BATCH, SEQ, EMBED)
        if isinstance(self.layers, Stages):
            x, updated = self.layers.keeping(self._through, x, positions, caches=caches)
        else:
            x, updated = self._through(self.layers, x, positions, caches)
        return self.norm(x), updated

    def _through(
        self, layers: Iterable[Block], x: jax.Array, positions: jax.Array, caches: Sequence[Cache] = ()
    ) -> tuple[jax.Array, tuple[Cache, ...]]:
        """Pass ``x [B, T, D]`` through some neighbouring layers."""
        turned = positions[..., None, None].astype(jnp.float32) * rope_frequencies(self.config)  # [B, T, 1, H / 2]
        # Or XLA works them out for every head of every layer again: a fifth of a prompt's time on a CPU.
        angles = computed_once(jnp.cos(turned)), computed_once(jnp.sin(turned))
        updated = []
        for index, block in enumerate(layers):
            x, cache = block(x, angles, positions, caches[index] if caches else None)
            if cache is not None:
                updated.append(cache)
        return x, tuple(updated)

    def logits(self, x: jax.Array) -> jax.Array:
        """Scores of every token for states ``x [..., D]``, as ``[..., V]`` float32."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        leading = (BATCH, SEQ)[: x.ndim - 1]
        return constrain(head.attend(x), *leading, VOCAB)


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _parts(config: Config) -> list[tuple[str, bool]]:
    """Each weighted part of a block, and whether it has a bias."""
    biased = {"self_attn": config.attention_bias, "mlp": config.mlp_bias}
    return [(part, biased.get(part.split(".")[0], False)) for part in _GGUF_NAMES]


def _unpermute(stored: npt.NDArray[Any], num_heads: int) -> npt.NDArray[Any]:
    """Undo llama.cpp's order of query and key rows: pairs of a head lie side by side there, half a head apart here."""
    pairs = stored.reshape(num_heads, -1, 2, *stored.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(stored.shape)


def name_table(config: Config, stored: str) -> dict[str, Source]:
    """Where each weight is kept: Hugging Face names in ``safetensors``, llama.cpp names in ``gguf``.

    Raises:
        ModelError: another format, in which Llama models are not stored.
    """
    if stored == "safetensors":
        names = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
    elif stored == "gguf":
        names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    else:
        raise ModelError(f"Llama models are stored as safetensors or gguf, not {stored!r}")
    if config.tie_embeddings:
        del names["lm_head"]
    table = {f"{path}.weight": Source(f"{name}.weight") for path, name in names.items()}
    heads = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    for index in range(config.num_layers):
        for part, biased in _parts(config):
            transform = None
            if stored == "gguf" and part in heads:
                transform = partial(_unpermute, num_heads=heads[part])
            for kind in ("weight", "bias") if biased else ("weight",):
                name = f"blk.{index}.{_GGUF_NAMES[part]}" if stored == "gguf" else f"model.layers.{index}.{part}"
                table[f"layers.{index}.{part}.{kind}"] = Source(f"{name}.{kind}", transform=transform)
    return table
