"""Ways to attend over a prompt itself: in plain XLA, or by cuDNN's fused attention on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from spmd_infer.axes import ATTN_HEADS, ATTN_KV_HEADS, HEAD_DIM, KEY_SEQ, SEQ, current_platform, current_scope
from spmd_infer.errors import ModelError
from spmd_infer.models.attention import causal_attention

AttendPrompt = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

XLA, CUDNN = "xla", "cudnn"


def cudnn_attention(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
    """As ``causal_attention``, by cuDNN.

    Raises:
        ModelError: it cannot take these; the message says why.
    """
    problem = cudnn_problem(queries, keys)
    if problem is not None:
        raise ModelError(f"cuDNN's attention is not used: {problem}")
    return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="cudnn")


def cudnn_problem(queries: jax.Array, keys: jax.Array) -> str | None:
    """Why cuDNN cannot attend with ``queries [B, T, N, H]`` and ``keys [B, T, K, H]``; None where it can.

    What it asks for beyond: queries, keys and values in one sharding, positions and the width of heads whole.
    """
    if current_platform() != "gpu":
        return "the devices are no NVIDIA GPUs"
    if queries.dtype not in (jnp.bfloat16, jnp.float16):
        return f"queries are {queries.dtype}, cuDNN takes bfloat16 and float16"
    width = queries.shape[-1]
    if width % 8 or width > 128:
        return f"heads of {width} numbers; it takes multiples of 8 up to 128"
    scope = current_scope()
    if scope is not None:
        rules, shape = scope[0].of_activations, dict(scope[1].shape)
        for axis, size in ((SEQ, queries.shape[1]), (KEY_SEQ, keys.shape[1]), (HEAD_DIM, width)):
            if found := rules.split(axis, size, shape):
                return f"{axis} is split over {', '.join(found)}"
        heads, groups = (
            rules.split(ATTN_HEADS, queries.shape[2], shape),
            rules.split(ATTN_KV_HEADS, keys.shape[2], shape),
        )
        if heads != groups:
            return f"query heads are split over {heads}, key heads over {groups}"
    return None


PROMPT_WAYS: Mapping[str, AttendPrompt] = MappingProxyType({XLA: causal_attention, CUDNN: cudnn_attention})
"""Every way to attend over a prompt, by name: as ``causal_attention`` takes and gives."""
