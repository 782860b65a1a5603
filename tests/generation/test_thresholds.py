"""The k-th largest logit and the first token that filters keep: equal to sorting, on split vocabularies too."""

from typing import Any

import jax
import numpy as np
import pytest
from jax.extend import random as jax_random

from spmd_infer.axes import BATCH, VOCAB, AxisRules, axis_scope
from spmd_infer.generation import thresholds
from spmd_infer.generation.choices import first_kept, likeliest
from spmd_infer.generation.noise import gumbel, threefry
from spmd_infer.generation.sampling import SAMPLING_AXES, SamplingArrays, SamplingParams, sample, sampling_arrays
from spmd_infer.generation.thresholds import top_k_threshold
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.audit import collectives
from spmd_infer.planning.layouts import LAYOUTS
from spmd_infer.tensors import Axes

ROWS, WORDS = 8, 2048
CASES = [(0, 1.0), (0, 0.9), (50, 1.0), (50, 0.5), (1, 0.3), (400, 0.95), (5000, 1.0), (0, 0.999)]


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    """Peaked rows, flat rows, a row of ties, and one with forbidden tokens."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(ROWS, WORDS)) * np.array([8, 4, 2, 1, 0.1, 3, 3, 3])[:, None]
    rows[5] = np.round(rows[5])
    rows[6, ::2] = -np.inf
    return rows.astype(np.float32)


def on_mesh(function: Any, where: str) -> Any:
    """The function compiled for a mesh, or for one device."""
    mesh = MeshSpec.parse(where).build() if where else None

    def scoped(*args: Any) -> Any:
        if mesh is None:
            return function(*args)
        with axis_scope(AxisRules(), mesh):
            return function(*args)

    return jax.jit(scoped)


def smallest_kept(row: np.ndarray, top_k: int, top_p: float) -> float:
    """By sorting, in float64; top-k keeps ties of the k-th, which then count for top-p."""
    kth = np.sort(row)[::-1][min(top_k or WORDS, WORDS) - 1] if top_k else -np.inf
    kept = np.sort(row[row >= kth])[::-1]
    mass = np.cumsum(np.exp(kept - kept[0]))
    return float(kept[np.searchsorted(mass, top_p * mass[-1])] if top_p < 1 else kth)


@pytest.mark.parametrize("where", ["", "model=8", "data=2,seq=2,model=2"])
@pytest.mark.parametrize("candidates", [2, 32, 2000])
def test_kth_logit(logits: np.ndarray, where: str, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "CANDIDATES", candidates)
    program = on_mesh(lambda *args: top_k_threshold(*args), where)
    for ks in ([1] * 8, [0, 1, 2, 3, 60, 700, 900, 5000], [0] * 8, [2048] * 8):
        found = np.asarray(program(logits, np.array(ks, np.int32)))
        expected = [np.sort(row)[::-1][min(k, WORDS) - 1] if k else -np.inf for k, row in zip(ks, logits, strict=True)]
        np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize("where", ["", "model=8", "data=2,seq=2,model=2"])
def test_first_kept_is_the_best_of_those_that_sorting_keeps(logits: np.ndarray, where: str) -> None:
    program = on_mesh(lambda *args: first_kept(*args), where)
    wrong = 0
    for top_k, top_p in [(0, 1.0), (0, 0.9), (0, 0.3), (0, 0.999), (1, 1.0), (50, 1.0), (700, 1.0), (5000, 1.0)]:
        for seed in range(6):
            noise = np.random.default_rng(seed).gumbel(size=logits.shape).astype(np.float32)
            noisy = logits + noise
            args = logits, noisy, np.full(ROWS, -np.inf, np.float32), np.full(ROWS, top_k, np.int32)
            tokens, best = map(np.asarray, program(*args, np.full(ROWS, top_p, np.float32)))
            for row in range(ROWS):
                kept = logits[row] >= smallest_kept(logits[row].astype(np.float64), top_k, float(np.float32(top_p)))
                wrong += tokens[row] != np.where(kept, noisy[row], -np.inf).argmax()
                assert best[row] == noisy[row, tokens[row]]
    # But for a token whose sum meets top_p within float32's rounding of 2,048 terms: hardly one in 384 draws.
    assert wrong <= 1


def test_floor_comes_first(logits: np.ndarray) -> None:
    """Top-p is of what the floor leaves, and a row of which it leaves nothing says so."""
    floor = np.full(ROWS, 0.5, np.float32)
    floor[3] = 1e9
    top_k, top_p = np.zeros(ROWS, np.int32), np.full(ROWS, 0.4, np.float32)
    noisy = logits + np.random.default_rng(1).gumbel(size=logits.shape).astype(np.float32)
    tokens, best = map(np.asarray, jax.jit(first_kept)(logits, noisy, floor, top_k, top_p))
    assert best[3] == -np.inf
    for row in (0, 1, 2, 5, 6, 7):
        left = np.where(logits[row] >= 0.5, logits[row], -np.inf).astype(np.float64)
        kept = left >= smallest_kept(left, 0, float(np.float32(0.4)))
        assert tokens[row] == np.where(kept, noisy[row], -np.inf).argmax()


@pytest.mark.parametrize("words", [1, 7, 256, 257, 1000, 2048])
@pytest.mark.parametrize("where", ["", "model=8"])
def test_likeliest_is_argmax(words: int, where: str) -> None:
    rng = np.random.default_rng(words)
    rows = np.round(rng.normal(0, 2, (32, words))).astype(np.float32)  # with ties: the first of them
    rows[0], rows[1, 0] = -np.inf, np.inf
    tokens, best = map(np.asarray, on_mesh(lambda x: likeliest(x), where)(rows))
    np.testing.assert_array_equal(tokens, rows.argmax(axis=1))
    np.testing.assert_array_equal(best, rows.max(axis=1))


def test_rows_of_nan_come_to_an_end() -> None:
    rows = np.zeros((3, 300), np.float32)
    rows[0], rows[1, 5] = np.nan, np.nan
    rows[2, 7] = 50
    top_k, top_p = np.array([3, 0, 3], np.int32), np.array([1.0, 0.5, 1.0], np.float32)
    floor = np.full(3, -np.inf, np.float32)
    tokens, _ = jax.jit(first_kept)(rows, rows, floor, top_k, top_p)
    assert int(tokens[2]) == 7


def test_noise_is_threefry() -> None:
    """With all twenty rounds the bits are those of JAX."""
    key = np.array([0x13198A2E, 0x03707344], np.uint32)
    counters = np.random.default_rng(0).integers(0, 2**32, (2, 64), dtype=np.uint32)
    ours = threefry(tuple(map(jax.numpy.uint32, key)), tuple(map(jax.numpy.asarray, counters)), rounds=20)
    theirs = jax_random.threefry_2x32(key, counters.reshape(-1))
    np.testing.assert_array_equal(np.concatenate(ours), theirs)


def test_noise_is_gumbel() -> None:
    from scipy import stats

    noise = np.asarray(jax.jit(gumbel, static_argnums=2)(np.arange(64, dtype=np.uint32), np.arange(64), 4096))
    assert np.isfinite(noise).all()
    assert stats.kstest(noise.ravel(), "gumbel_r", method="asymp").pvalue > 1e-3
    # Neighbouring seeds, steps and tokens have nothing in common.
    along = [
        np.corrcoef(noise[:-1].ravel(), noise[1:].ravel()),
        np.corrcoef(noise[:, :-1].ravel(), noise[:, 1:].ravel()),
    ]
    assert max(abs(each[0, 1]) for each in along) < 0.01  # five standard deviations of 262,144 pairs


@pytest.mark.parametrize("name", ["1d", "2d", "gathered", "kv-batch"])
@pytest.mark.parametrize("where", ["model=8", "data=2,model=4"])
def test_the_same_tokens_everywhere_without_gathering(logits: np.ndarray, name: str, where: str) -> None:
    params = [
        SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=3)
        for temperature, (top_k, top_p) in zip((0.0, 0.5, 1.0, 1.0, 2.0, 1.0, 0.7, 1.0), CASES, strict=True)
    ]
    fields, steps = sampling_arrays(params, ()), np.arange(ROWS, dtype=np.int32)
    expected = np.asarray(jax.jit(sample)(logits, SamplingArrays(**fields), steps))
    rules, mesh = LAYOUTS[name], MeshSpec.parse(where).build()

    def place(x: np.ndarray, axes: Axes) -> jax.Array:
        spec = rules.of_activations.resolve(axes, x.shape, dict(mesh.shape)).spec
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    def on_this_mesh(logits: jax.Array, arrays: SamplingArrays, steps: jax.Array) -> jax.Array:
        with axis_scope(rules, mesh):
            return sample(logits, arrays, steps)

    arrays = SamplingArrays(**{field: place(value, SAMPLING_AXES[field]) for field, value in fields.items()})
    inputs = place(logits, (BATCH, VOCAB)), arrays, place(steps, (BATCH,))
    compiled = jax.jit(on_this_mesh).lower(*inputs).compile()
    assert (np.asarray(compiled(*inputs)) == expected).all()
    found = collectives(compiled)
    if name == "gathered":  # every device has whole rows
        assert found == []
        return
    assert {(each.kind, each.axes(mesh)) for each in found} == {("all-gather", ("model",)), ("all-reduce", ("model",))}
    # Candidates for a k-th logit are gathered; all other messages are a few numbers for each row.
    rows, parts = inputs[0].sharding.shard_shape(logits.shape)[0], mesh.shape["model"]
    offered = rows * parts * min(thresholds.CANDIDATES, WORDS // parts) * 4
    assert max(each.nbytes for each in found if each.kind == "all-gather") == offered
    assert sum(each.nbytes == offered for each in found) == 1
    assert sorted({each.nbytes for each in found if each.kind == "all-gather"})[:-1] == [rows * parts * 3 * 4]
    assert max(each.nbytes for each in found if each.kind == "all-reduce") <= 4 * rows * 4  # XLA joins some


def test_messages_for_a_real_vocabulary() -> None:
    """128,256 tokens over 8 devices: what is gathered is under 1 % of the logits."""
    mesh = MeshSpec.parse("model=8").build()
    shapes = jax.ShapeDtypeStruct((4, 128_256), np.float32), jax.ShapeDtypeStruct((4,), np.int32)
    arrays = SamplingArrays(**sampling_arrays([SamplingParams(temperature=1.0, top_p=0.9)] * 4, ()))

    def split_sample(logits: jax.Array, steps: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return sample(logits, arrays, steps)

    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    compiled = jax.jit(split_sample, in_shardings=(split, None)).lower(*shapes).compile()
    found = collectives(compiled)
    assert {each.kind for each in found} == {"all-gather", "all-reduce"}
    assert max(each.nbytes for each in found) <= 4 * 8 * thresholds.CANDIDATES * 4 < 0.01 * 4 * 128_256 * 4
