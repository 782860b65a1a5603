"""The cache: attention over it is attention over the sequence, it is updated in place, and it knows its size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spmd_infer.generation.cache import KVCache, cache_axes, cache_dtype
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.models.attention import ContiguousCache, causal_attention
from spmd_infer.models.llama import Config

SMOLLM2 = Config(49152, 576, 1536, 30, 9, 3, 64, 8192)


def numpy_attention(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Causal attention the plain way, in float64: ``[B, T, N, H]`` over ``[B, T, K, H]``."""
    group = queries.shape[2] // keys.shape[2]
    keys, values = np.repeat(keys, group, 2).astype(np.float64), np.repeat(values, group, 2).astype(np.float64)
    scores = np.einsum("btnh,bsnh->bnts", queries.astype(np.float64), keys) / np.sqrt(queries.shape[-1])
    scores[:, :, ~np.tri(queries.shape[1], dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnts,bsnh->btnh", weights / weights.sum(-1, keepdims=True), values)


def random_heads(heads: int, kv_heads: int, length: int, batch: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(heads + kv_heads)
    shapes = (batch, length, heads, 8), (batch, length, kv_heads, 8), (batch, length, kv_heads, 8)
    queries, keys, values = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return queries, keys, values


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_causal_attention_equals_numpy(heads: int, kv_heads: int) -> None:
    arrays = random_heads(heads, kv_heads, 21)
    np.testing.assert_allclose(jax.jit(causal_attention)(*arrays), numpy_attention(*arrays), atol=1e-5)


def test_causal_attention_in_blocks_equals_numpy() -> None:
    arrays = random_heads(2, 1, 1100, batch=1)
    np.testing.assert_allclose(jax.jit(causal_attention)(*arrays), numpy_attention(*arrays), atol=1e-5)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_steps_over_the_cache_equal_the_whole(heads: int, kv_heads: int) -> None:
    queries, keys, values = random_heads(heads, kv_heads, 20)
    prompts = np.array([1, 7, 12])  # rows of different lengths, the rest of each prompt is padding
    cache = ContiguousCache(jnp.zeros((3, kv_heads, 8, 32)), jnp.zeros((3, kv_heads, 32, 8)))
    first = jnp.broadcast_to(jnp.arange(12), (3, 12))
    mixed, cache = cache.attend(*(jnp.asarray(x[:, :12]) for x in (queries, keys, values)), first)
    expected = numpy_attention(queries, keys, values)
    np.testing.assert_allclose(mixed, expected[:, :12], atol=1e-5)
    rows = np.arange(3)
    step = jax.jit(lambda cache, q, k, v, at: cache.attend(q[:, None], k[:, None], v[:, None], at[:, None]))
    for offset in range(8):
        at = prompts + offset
        mixed, cache = step(cache, queries[rows, at], keys[rows, at], values[rows, at], at.astype(np.int32))
        np.testing.assert_allclose(mixed[:, 0], expected[rows, at], atol=1e-5)


@pytest.mark.parametrize(("batch", "devices"), [(1, 1), (4, 1), (8, 8), (16, 8)])
def test_a_step_neither_copies_nor_gathers_the_cache(batch: int, devices: int) -> None:
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def shape(*sizes: int, dtype: object = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, *sizes), dtype, sharding=rows)

    def step(cache: ContiguousCache, q: jax.Array, k: jax.Array, v: jax.Array, at: jax.Array) -> object:
        mixed, cache = cache.attend(q[:, None], k[:, None], v[:, None], at[:, None])
        return cache, mixed

    cache = ContiguousCache(shape(3, 64, 512), shape(3, 512, 64))
    lowered = jax.jit(step, donate_argnums=0).lower(
        cache, shape(9, 64), shape(3, 64), shape(3, 64), shape(dtype=jnp.int32)
    )
    compiled = lowered.compile()
    text = compiled.as_text()
    local = batch // devices
    sizes = rf"f32\[{local},3,(?:64,512|512,64)\]"
    made = re.findall(rf"= {sizes}\S* ([\w-]+)\(", text)
    assert "scatter" in made
    assert not {"copy", "transpose", "dynamic-update-slice"} & set(made)
    assert not re.search(r"all-gather|all-reduce|collective-permute|all-to-all", text)
    cache_bytes = 2 * local * 3 * 64 * 512 * 4
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 4


def _is_axes(node: object) -> bool:
    return isinstance(node, tuple) and any(isinstance(name, str) for name in node)


def test_sizes() -> None:
    # 30 layers of keys and values, 3 heads of 64.
    assert page_bytes(SMOLLM2, np.float32) == PAGE_SIZE * 30 * 2 * 3 * 64 * 4 == PAGE_SIZE * 46080
    assert page_bytes(SMOLLM2, jnp.bfloat16) == PAGE_SIZE * 23040
    cache = jax.eval_shape(lambda: KVCache.zeros(SMOLLM2, 4, 256, np.float32))
    assert sum(leaf.size * 4 for layer in cache.layers for leaf in jax.tree.leaves(layer)) == 4 * 256 * 46080
    assert cache.capacity == 256
    axes = jax.tree.structure(cache_axes(SMOLLM2), is_leaf=lambda node: _is_axes(node))
    assert axes == jax.tree.structure(cache)


def test_cpu_keeps_float32() -> None:
    assert cache_dtype("cpu", jnp.bfloat16) == np.float32
    assert cache_dtype("gpu", jnp.bfloat16) == jnp.bfloat16
