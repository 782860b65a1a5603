"""Top-k and top-p thresholds: from candidates, from passes, and on split vocabularies, with small messages only."""

import jax
import numpy as np
import pytest

from spmd_infer.axes import BATCH, VOCAB, AxisRules, axis_scope
from spmd_infer.generation import thresholds
from spmd_infer.generation.sampling import SAMPLING_AXES, SamplingArrays, SamplingParams, sample, sampling_arrays
from spmd_infer.generation.thresholds import filter_thresholds
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


def sorted_thresholds(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """By sorting, in float64; top-k keeps ties of the k-th, which then count for top-p."""
    found = []
    for row in logits.astype(np.float64):
        kth = np.sort(row)[::-1][min(top_k or WORDS, WORDS) - 1] if top_k else -np.inf
        kept = np.sort(row[row >= kth])[::-1]
        mass = np.cumsum(np.exp(kept - kept[0]))
        found.append(kept[np.searchsorted(mass, top_p * mass[-1])] if top_p < 1 else kth)
    return np.array(found)


def kept(logits: np.ndarray, found: np.ndarray) -> np.ndarray:
    return (logits >= found[:, None]).sum(1)


@pytest.mark.parametrize("where", ["", "model=8", "data=2,seq=2,model=2"])
@pytest.mark.parametrize("candidates", [2, 32, 2000])
def test_equal_to_sorting(logits: np.ndarray, where: str, candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "CANDIDATES", candidates)
    mesh = MeshSpec.parse(where).build() if where else None

    def on_mesh(*args: jax.Array) -> jax.Array:
        if mesh is None:
            return filter_thresholds(*args)
        with axis_scope(AxisRules(), mesh):
            return filter_thresholds(*args)

    program = jax.jit(on_mesh)
    for top_k, top_p in CASES:
        ks, ps = np.full(ROWS, top_k, np.int32), np.full(ROWS, top_p, np.float32)
        found = np.asarray(program(logits, ks, ps))
        expected = sorted_thresholds(logits, top_k, float(np.float32(top_p)))
        # The same tokens are kept, but for one whose sum meets top_p within float32's rounding of 2,048 terms.
        assert np.abs(kept(logits, found) - kept(logits, expected)).max() <= (0 if top_p == 1 else 1), (top_k, top_p)


def test_rows_with_parameters_of_their_own(logits: np.ndarray) -> None:
    ks, ps = (np.array(values) for values in zip(*CASES, strict=True))
    found = np.asarray(jax.jit(filter_thresholds)(logits, ks.astype(np.int32), ps.astype(np.float32)))
    for row, (top_k, top_p) in enumerate(CASES):
        expected = sorted_thresholds(logits[row : row + 1], top_k, float(np.float32(top_p)))
        assert abs(kept(logits[row : row + 1], found[row : row + 1]) - kept(logits[row : row + 1], expected))[0] <= 1


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

    def on_mesh(logits: jax.Array, arrays: SamplingArrays, steps: jax.Array) -> jax.Array:
        with axis_scope(rules, mesh):
            return sample(logits, arrays, steps)

    arrays = SamplingArrays(**{field: place(value, SAMPLING_AXES[field]) for field, value in fields.items()})
    inputs = place(logits, (BATCH, VOCAB)), arrays, place(steps, (BATCH,))
    compiled = jax.jit(on_mesh).lower(*inputs).compile()
    assert (np.asarray(compiled(*inputs)) == expected).all()
    found = collectives(compiled)
    if name == "gathered":  # every device has whole rows
        assert found == []
        return
    assert {(each.kind, each.axes(mesh)) for each in found} == {("all-gather", ("model",)), ("all-reduce", ("model",))}
    # Candidates are gathered; all other messages are a number or two for each row.
    rows, parts = inputs[0].sharding.shard_shape(logits.shape)[0], mesh.shape["model"]
    offered = rows * parts * min(thresholds.CANDIDATES, WORDS // parts) * 4
    assert [each.nbytes for each in found if each.kind == "all-gather"] == [offered]
    assert max(each.nbytes for each in found if each.kind == "all-reduce") <= rows * 4


def test_messages_for_a_real_vocabulary() -> None:
    """128,256 tokens over 8 devices: what is gathered is under 1 % of the logits."""
    mesh = MeshSpec.parse("model=8").build()
    shapes = jax.ShapeDtypeStruct((4, 128_256), np.float32), jax.ShapeDtypeStruct((4,), np.int32)
    arrays = SamplingArrays(**sampling_arrays([SamplingParams(temperature=1.0, top_p=0.9)] * 4, ()))

    def on_mesh(logits: jax.Array, steps: jax.Array) -> jax.Array:
        with axis_scope(AxisRules(), mesh):
            return sample(logits, arrays, steps)

    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    compiled = jax.jit(on_mesh, in_shardings=(split, None)).lower(*shapes).compile()
    found = collectives(compiled)
    assert {each.kind for each in found} == {"all-gather", "all-reduce"}
    assert max(each.nbytes for each in found) == 4 * 8 * thresholds.CANDIDATES * 4 < 0.01 * 4 * 128_256 * 4
