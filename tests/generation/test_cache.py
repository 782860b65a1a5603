"""The cache: attention over it is attention over the sequence, it is updated in place, and it knows its size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spmd_infer.errors import ModelError
from spmd_infer.generation.cache import KVCache, cache_axes
from spmd_infer.generation.kv_pages import PAGE_SIZE, KVPages, page_bytes
from spmd_infer.models.attention import ContiguousCache, causal_attention
from spmd_infer.models.cache_formats import CacheFormat, Packed, restored
from spmd_infer.models.llama import Config
from spmd_infer.plans import plan

FORMATS = ("float32", "bfloat16", "int8", "fp8")
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
    sizes = {name: page_bytes(SMOLLM2, CacheFormat.of(name, "cpu", np.float32)) // PAGE_SIZE for name in FORMATS}
    positions = 30 * 2 * 3
    assert sizes["float32"] == positions * 64 * 4 == 46080
    assert sizes["bfloat16"] == 23040
    assert sizes["int8"] == sizes["fp8"] == positions * (64 + 4)
    cache = jax.eval_shape(lambda: KVCache.zeros(SMOLLM2, 4, 256, np.float32))
    assert sum(leaf.size * 4 for layer in cache.layers for leaf in jax.tree.leaves(layer)) == 4 * 256 * 46080
    assert cache.capacity == 256
    axes = jax.tree.structure(cache_axes(SMOLLM2), is_leaf=lambda node: _is_axes(node))
    assert axes == jax.tree.structure(cache)


def test_formats_by_platform() -> None:
    assert CacheFormat.of("auto", "cpu", jnp.bfloat16).name == "float32"
    assert CacheFormat.of("auto", "gpu", jnp.bfloat16).dtype == jnp.bfloat16
    assert CacheFormat.of("bfloat16", "gpu", jnp.bfloat16).dtype == jnp.bfloat16
    with pytest.raises(ModelError, match="a cache cannot hold 'int4'"):
        CacheFormat.of("int4", "cpu", jnp.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_pages_are_inserted_gathered_copied_and_resized_with_their_scales(name: str) -> None:
    fmt, sizes = CacheFormat.of(name, "cpu", np.float32), Config(64, 16, 16, 2, 4, 2, 8, 256)
    values = np.random.default_rng(0).normal(size=(2, 2 * 64, 2, 8)).astype(np.float32)
    values[0, 3] = 0  # a position whose scale is of nothing
    packed = fmt.pack(jnp.asarray(values))
    pages = KVPages.zeros(sizes, 1, 5, fmt)
    assert sum(x.nbytes for x in jax.tree.leaves(pages)) == 5 * page_bytes(sizes, fmt)
    pages = pages.inserted([packed] * 2, [packed] * 2, np.array([[[3, 0], [1, 5]]]))  # one span has no page
    pages = pages.copied(np.array([[0, 3]]), np.array([[2, 5]])).resized(4).resized(8)
    assert pages.num_pages == 8
    keys, found = pages.gathered(np.array([[[3, 2], [1, 0]]]))
    back = np.asarray(restored(packed)).reshape(4, 64, 2, 8).swapaxes(1, 2)  # [span, K, S, H]
    expected = np.stack([back[[0, 1]], back[[2, 1]]])
    for layer in range(2):
        for held, turned in ((keys[layer], True), (found[layer], False)):
            numbers = held.numbers.swapaxes(3, 4) if turned else held.numbers
            np.testing.assert_array_equal(restored(Packed(numbers, held.scales)), expected)


@pytest.mark.parametrize(("name", "most"), [("bfloat16", 2**-8), ("int8", 0.5 / 127), ("fp8", 2**-4)])
def test_what_a_format_loses(name: str, most: float) -> None:
    fmt = CacheFormat.of(name, "cpu", np.float32)
    values = np.random.default_rng(1).normal(size=(1000, 64)).astype(np.float32) * np.logspace(-6, 6, 1000)[:, None]
    lost = np.abs(
        np.asarray(fmt.rounded(jnp.asarray(values, np.float32), fmt.pack(jnp.asarray(values, np.float32)))) - values
    )
    reach = np.abs(values) if name != "int8" else np.abs(values).max(-1, keepdims=True)
    small = np.abs(values).max(-1, keepdims=True) / 448 * 2**-9  # half the smallest step of float8
    assert (lost <= most * reach * 1.001 + (small if name == "fp8" else 0)).all()


@pytest.mark.parametrize("name", ["int8", "fp8", "bfloat16"])
def test_a_contiguous_cache_of_small_numbers_gives_back_what_they_hold(name: str) -> None:
    fmt = CacheFormat.of(name, "gpu", np.float32)
    queries, keys, values = map(jnp.asarray, random_heads(6, 2, 12))
    scales = jnp.zeros((3, 2, 16)) if fmt.scaled else None
    cache = ContiguousCache(
        jnp.zeros((3, 2, 8, 16), fmt.dtype), jnp.zeros((3, 2, 16, 8), fmt.dtype), scales, scales, fmt
    )
    _, cache = cache.attend(queries[:, :8], keys[:, :8], values[:, :8], jnp.arange(8)[None])
    expected = numpy_attention(*(np.asarray(x) for x in (queries, fmt_back(fmt, keys), fmt_back(fmt, values))))
    for at in range(8, 12):
        here = slice(at, at + 1)
        mixed, cache = cache.attend(queries[:, here], keys[:, here], values[:, here], jnp.full((3, 1), at))
        np.testing.assert_allclose(mixed[:, 0], expected[:, at], atol=1e-5)


def fmt_back(fmt: CacheFormat, values: jax.Array) -> jax.Array:
    return fmt.rounded(values, fmt.pack(values))


def test_plans_count_small_numbers_and_their_scales() -> None:
    heads, positions, rows = 2 * 32 * 8, 2000 + 200, 64
    bytes_of = {
        name: plan(
            "llama-3.1-8b", devices="1xH100", batch=rows, length=2000, output=200, cache_dtype=name
        ).chosen.memory.cache
        for name in ("auto", "int8", "fp8")
    }
    assert bytes_of["auto"] == rows * positions * heads * 128 * 2
    assert bytes_of["int8"] == bytes_of["fp8"] == rows * positions * heads * (128 + 4)
