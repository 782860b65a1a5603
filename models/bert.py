"""BERT encoder (Devlin et al. 2018): bidirectional attention, learned positions, norms after each residual sum.

What differs from the reference: rows may hold several packed sentences, told apart by ``segment_ids``, and attention
stays inside each; there is no dropout and no pooler (sentence embeddings are means over tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_infer.axes import ATTN_HEADS, BATCH, EMBED, HEADS, MLP, SEQ, constrain
from spmd_infer.errors import ModelError
from spmd_infer.models.attention import segment_attention
from spmd_infer.models.heads import keys_in, mixed_out, queries_in
from spmd_infer.models.layers import Embedding, LayerNorm, Linear
from spmd_infer.models.pipeline import run_layers
from spmd_infer.tensors import InputSpec, Source

_ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
# Checkpoints of these architectures hold the encoder by itself; in all others its names begin with "bert.".
_BARE = ("BertModel", "bert")


@dataclass(frozen=True)
class Config:
    """Sizes of a BERT encoder.

    Attributes:
        vocab_size: rows of the word embedding.
        embed_dim: width of the residual stream.
        mlp_dim: hidden width of the feed-forward blocks.
        num_layers: how many blocks there are.
        num_heads: attention heads; they divide ``embed_dim``.
        max_positions: the longest sentence.
        num_token_types: rows of the token type embedding.
        activation: of the feed-forward blocks, by its Hugging Face name.
        norm_epsilon: of the layer norms.
        prefix: what the weights' names in a Hugging Face checkpoint begin with.
    """

    vocab_size: int
    embed_dim: int
    mlp_dim: int
    num_layers: int
    num_heads: int
    max_positions: int = 512
    num_token_types: int = 2
    activation: str = "gelu"
    norm_epsilon: float = 1e-12
    prefix: str = ""

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ModelError(f"{self.num_heads} attention heads do not divide the width {self.embed_dim}")
        if self.activation not in _ACTIVATIONS:
            raise ModelError(
                f"activation {self.activation!r} is not known; known are {', '.join(sorted(_ACTIVATIONS))}"
            )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Self:
        """From the keys of a ``config.json``.

        Raises:
            ModelError: a size is missing, or the model is a decoder or has relative positions.
        """
        needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        missing = [key for key in needed if not isinstance(config.get(key), int)]
        if missing:
            raise ModelError(f"a BERT configuration needs whole numbers for {', '.join(missing)}")
        positions = config.get("position_embedding_type") or "absolute"
        if positions != "absolute":
            raise ModelError(f"position_embedding_type is {positions!r}; only 'absolute' positions are supported")
        if config.get("is_decoder"):
            raise ModelError("this BERT is a decoder (is_decoder is true); only encoders are supported")
        architectures = config.get("architectures") or ["BertModel"]
        return cls(
            vocab_size=config["vocab_size"],
            embed_dim=config["hidden_size"],
            mlp_dim=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            max_positions=config.get("max_position_embeddings", 512),
            num_token_types=config.get("type_vocab_size", 2),
            activation=config.get("hidden_act", "gelu"),
            norm_epsilon=config.get("layer_norm_eps", 1e-12),
            prefix="" if architectures[0] in _BARE else "bert.",
        )

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.embed_dim // self.num_heads

    def axis_units(self) -> dict[str, int]:
        """The fused projections split into whole heads only."""
        return {HEADS: self.num_heads, ATTN_HEADS: self.num_heads}


class Embeddings(nnx.Module):
    """Word + position + token type, normalised.

    The tables are whole on every device: a vocabulary split over devices would cost a collective for a lookup that
    otherwise needs none, to spare at most 94 MB (BERT-base, f32); and 30,522 words split into 2 or 3 parts only.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        table = partial(Embedding, width=config.embed_dim, axes=(None, EMBED), rngs=rngs)
        self.word_embeddings = table(config.vocab_size)
        self.position_embeddings = table(config.max_positions)
        self.token_type_embeddings = table(config.num_token_types)
        self.LayerNorm = LayerNorm(config.embed_dim, axes=(EMBED,), epsilon=config.norm_epsilon)

    def __call__(self, input_ids: jax.Array, position_ids: jax.Array, token_type_ids: jax.Array) -> jax.Array:
        """Embed ids ``[B, T]`` as ``[B, T, D]``."""
        words = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        return self.LayerNorm(words + self.position_embeddings(position_ids))


class SelfAttention(nnx.Module):
    """Attention of every token to the tokens of its own segment."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        project = partial(Linear, config.embed_dim, config.embed_dim, axes=(HEADS, EMBED), use_bias=True, rngs=rngs)
        self.query, self.key, self.value = project(), project(), project()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim

    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """Attend over ``x [B, T, D]`` within ``segments [B, T]``, in float32 scores; returns ``[B, T, D]``."""

        def heads(projection: Linear) -> jax.Array:
            return projection(x).reshape(*x.shape[:2], self.num_heads, self.head_dim)  # [B, T, N, H]

        query = queries_in(heads(self.query))
        key, value = (keys_in(heads(projection), HEADS, ATTN_HEADS) for projection in (self.key, self.value))
        return mixed_out(segment_attention(query, key, value, segments)).reshape(x.shape)


class Output(nnx.Module):
    """A projection back to the residual width, added to the residual and normalised."""

    def __init__(self, config: Config, width: int, axis: str, *, rngs: nnx.Rngs) -> None:
        self.dense = Linear(width, config.embed_dim, axes=(EMBED, axis), use_bias=True, rngs=rngs)
        self.LayerNorm = LayerNorm(config.embed_dim, axes=(EMBED,), epsilon=config.norm_epsilon)

    def __call__(self, x: jax.Array, residual: jax.Array) -> jax.Array:
        """``[B, T, width]`` and the residual ``[B, T, D]`` to ``[B, T, D]``."""
        return self.LayerNorm(constrain(self.dense(x), BATCH, SEQ, EMBED) + residual)


class Attention(nnx.Module):
    """The attention half of a block."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.self = SelfAttention(config, rngs=rngs)
        self.output = Output(config, config.embed_dim, HEADS, rngs=rngs)


class Intermediate(nnx.Module):
    """The first, widening half of a feed-forward block."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.dense = Linear(config.embed_dim, config.mlp_dim, axes=(MLP, EMBED), use_bias=True, rngs=rngs)
        self.activation = config.activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[B, T, D]`` to ``[B, T, F]``."""
        return _ACTIVATIONS[self.activation](constrain(self.dense(x), BATCH, SEQ, MLP))


class Layer(nnx.Module):
    """Attention, then a feed-forward block, each followed by its residual sum and norm."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, rngs=rngs)
        self.intermediate = Intermediate(config, rngs=rngs)
        self.output = Output(config, config.mlp_dim, MLP, rngs=rngs)

    def __call__(self, x: jax.Array, segments: jax.Array) -> jax.Array:
        """``[B, T, D]`` and segment ids ``[B, T]`` to ``[B, T, D]``."""
        x = self.attention.output(self.attention.self(x, segments), x)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """The blocks, one after the other."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.layer = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])


def _through(layers: Iterable[Layer], x: jax.Array, segments: jax.Array) -> jax.Array:
    """Pass ``x [B, T, D]`` through some neighbouring layers."""
    for layer in layers:
        x = layer(x, segments)
    return x


class Bert(nnx.Module):
    """BERT encoder.

    Args:
        config: its sizes.
        rngs: source of the initial weights.
    """

    pipelined_layers = "encoder.layer"

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        self.embeddings = Embeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.max_positions = config.max_positions

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        token_type_ids: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Encode rows of tokens; all inputs are int32 ``[B, T]``.

        Args:
            input_ids: token ids.
            attention_mask: 1 for tokens, 0 for padding; the default is no padding.
            token_type_ids: 0 or 1 for the first or second sentence of a pair; the default is 0.
            position_ids: each token's place in its sentence; the default counts along the row.
            segment_ids: which of a row's packed sentences a token belongs to, from 1; 0 is padding. Replaces
                ``attention_mask``.

        Returns:
            ``last_hidden_state [B, T, D]``; at padding it means nothing.

        Raises:
            ModelError: rows are longer than the model's positions, and no ``position_ids`` say where sentences begin.
        """
        length = input_ids.shape[1]
        if position_ids is None:
            if length > self.max_positions:
                raise ModelError(
                    f"rows of {length} tokens, but the model has {self.max_positions} positions; cut the rows, or give "
                    "position_ids that start afresh with every sentence"
                )
            position_ids = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), input_ids.shape)
        if token_type_ids is None:
            token_type_ids = jnp.zeros_like(input_ids)
        segments = segment_ids if segment_ids is not None else attention_mask
        if segments is None:
            segments = jnp.ones_like(input_ids)
        x = constrain(self.embeddings(input_ids, position_ids, token_type_ids), BATCH, SEQ, EMBED)
        return {"last_hidden_state": run_layers(self.encoder.layer, _through, x, segments)}

    def embed(
        self,
        input_ids: jax.Array,
        position_ids: jax.Array,
        segment_ids: jax.Array,
        *,
        segments: int,
        pooling: Literal["mean", "first"] = "mean",
    ) -> jax.Array:
        """One vector for each packed sentence, pooled on the device so that only these are transferred.

        Args:
            input_ids: token ids ``[B, T]``.
            position_ids: each token's place in its sentence.
            segment_ids: sentence of each token in its row, from 1; 0 is padding.
            segments: the most sentences that a row holds.
            pooling: the mean over a sentence's tokens, or its first token (``[CLS]``).

        Returns:
            Float32 ``[B, segments, D]``; zeros where a row has no such sentence.
        """
        hidden = self(input_ids, position_ids=position_ids, segment_ids=segment_ids)["last_hidden_state"]
        wanted = jnp.arange(1, segments + 1, dtype=segment_ids.dtype)
        counted = segment_ids if pooling == "mean" else jnp.where(position_ids == 0, segment_ids, 0)
        member = (counted[:, None, :] == wanted[None, :, None]).astype(hidden.dtype)  # [B, segments, T]
        total = jnp.einsum("bgt,btd->bgd", member, hidden, preferred_element_type=jnp.float32)
        count = jnp.sum(member, axis=-1, keepdims=True, dtype=jnp.float32)
        return constrain(total / jnp.maximum(count, 1.0), BATCH, None, EMBED)


def input_spec(config: Config) -> dict[str, InputSpec]:
    """The encoder's inputs; only ``input_ids`` must be given."""
    ids = partial(InputSpec, (BATCH, SEQ), "int32")
    optional = ("attention_mask", "token_type_ids", "position_ids", "segment_ids")
    return {"input_ids": ids()} | {name: ids(required=False) for name in optional}


_GGUF_TABLES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
_GGUF_LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def name_table(config: Config, stored: str) -> dict[str, Source]:
    """Each weight's place: under its own path in Hugging Face checkpoints, under llama.cpp's short name in GGUF."""
    names = dict(_GGUF_TABLES)
    for layer in range(config.num_layers):
        names |= {f"encoder.layer.{layer}.{path}": f"blk.{layer}.{short}" for path, short in _GGUF_LAYER.items()}
    table = {}
    for path, short in names.items():
        kinds = ("weight",) if path.endswith("_embeddings") else ("weight", "bias")
        for kind in kinds:
            name = f"{short}.{kind}" if stored == "gguf" else f"{config.prefix}{path}.{kind}"
            table[f"{path}.{kind}"] = Source(name)
    return table
