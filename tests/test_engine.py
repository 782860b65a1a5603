"""The engine on models of a user's own: any kind, any batch size, few programs, nothing lost."""

import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, PartitionSpec

import spmd_infer as si
from spmd_infer.errors import BatchError, DoesNotFitError, ModelError, TaskError
from spmd_infer.planning.audit import collectives

# float32 sums of up to 1,024 products in another order, relative to outputs of order 1.
TOLERANCE = 1e-5
X = np.random.default_rng(0).normal(size=(100, 64)).astype(np.float32)


class Mlp(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(64, 1024, rngs=rngs)
        self.down = nnx.Linear(1024, 32, rngs=rngs)

    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        hidden = nnx.relu(self.up(x))
        return {"y": self.down(hidden), "norm": jnp.linalg.norm(hidden, axis=-1)}


class Annotated(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(64, 1024, rngs=rngs, kernel_metadata={"axes": ("embed", "mlp")})
        self.down = nnx.Linear(1024, 32, rngs=rngs, kernel_metadata={"axes": ("mlp", "embed")})

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.relu(si.constrain(self.up(x), "batch", "mlp")))


MODEL = Mlp(rngs=nnx.Rngs(0))
EXPECTED = {key: np.asarray(value) for key, value in MODEL(X).items()}


def test_batch_sizes_share_programs() -> None:
    engine = si.Engine(MODEL, mesh="data=4,model=2", example=X)
    for rows in (1, 3, 8, 100, 8, 2, 99):
        out = engine.infer(X[:rows])
        for key, expected in EXPECTED.items():
            assert isinstance(out[key], np.ndarray)
            np.testing.assert_allclose(out[key], expected[:rows], rtol=TOLERANCE, atol=TOLERANCE)
    # 1, 2 and 3 rows fill a bucket of 4; 8 one of 8; 99 and 100 one of 64 twice.
    assert engine.compiles == 3


def test_on_every_mesh(mesh_text: str) -> None:
    engine = si.Engine(Annotated(rngs=nnx.Rngs(1)), mesh=mesh_text, example=X, buckets=[16])
    np.testing.assert_allclose(engine.infer(X), Annotated(rngs=nnx.Rngs(1))(X), rtol=TOLERANCE, atol=TOLERANCE)
    found = collectives(engine.programs[0].compiled)
    parts = engine.plan.mesh.shape
    assert [each.kind for each in found] == ["all-reduce"] * (parts["model"] > 1)
    assert all(each.axes(engine.mesh) == ("model",) for each in found)


@pytest.mark.parametrize("kind", ["nnx", "linen", "function"])
def test_unannotated_models_of_every_kind(kind: str) -> None:
    if kind == "nnx":
        model, params = nnx.Linear(64, 512, rngs=nnx.Rngs(0)), None
        expected = model(X)
    elif kind == "linen":
        model = nn.Dense(512)
        params = model.init(jax.random.key(0), X)
        expected = model.apply(params, X)
    else:
        params = {"w": np.random.default_rng(1).normal(size=(64, 512)).astype(np.float32)}
        model, expected = (lambda p, x: x @ p["w"]), X @ params["w"]
    engine = si.Engine(model, params, mesh="data=4,model=2", example=X)
    np.testing.assert_allclose(engine.infer(X), expected, rtol=1e-4, atol=TOLERANCE)
    assert any("name no axes" in note for note in engine.plan.notes)
    assert [layout.spec for layout in engine.plan.weights if len(layout.shape) == 2] == [PartitionSpec(None, "model")]


def test_flax_annotations_are_read() -> None:
    mesh = si.MeshSpec.parse("data=2,model=4").build()
    with jax.set_mesh(mesh):
        model = nnx.Linear(64, 32, rngs=nnx.Rngs(0), kernel_metadata={"out_sharding": (None, "model")})
    engine = si.Engine(model, mesh=mesh, example=X)
    assert {w.path: w.spec for w in engine.plan.weights}["kernel"] == PartitionSpec(None, "model")
    np.testing.assert_allclose(engine.infer(X), X @ np.asarray(model.kernel[...]), rtol=1e-4, atol=TOLERANCE)


@pytest.mark.parametrize("container", ["dict", "tuple", "array"])
def test_batches_of_any_structure(container: str) -> None:
    class Sum(nnx.Module):
        def __call__(self, a: jax.Array, b: jax.Array | None = None) -> tuple[jax.Array, list[jax.Array]]:
            return a + (0 if b is None else b), [a]

    a, b = X[:5, :3], X[5:10, :3]
    batch = {"dict": {"a": a, "b": b}, "tuple": (a, b), "array": a}[container]
    total, (same,) = si.Engine(Sum(), mesh="data=2", example=batch).infer(batch)
    np.testing.assert_array_equal(total, a if container == "array" else a + b)
    np.testing.assert_array_equal(same, a)


def test_the_first_batch_teaches_the_signature() -> None:
    engine = si.Engine(lambda p, x: x * 2, {}, mesh="data=2")
    with pytest.raises(BatchError, match="not known yet"):
        engine.warmup()
    np.testing.assert_array_equal(engine.infer([[1.0, 2.0], [3.0, 4.0]]), [[2, 4], [6, 8]])
    with pytest.raises(BatchError, match=r"expected float32\[batch, 2\], got float32\[1, 3\]"):
        engine.infer(np.ones((1, 3), np.float32))


def test_a_first_batch_that_the_model_refuses_teaches_nothing() -> None:
    engine = si.Engine(lambda p, x: x @ p, jnp.ones((4, 2)), mesh="data=1")
    with pytest.raises(BatchError, match="does not accept"):
        engine.infer(np.ones((3, 5), np.float32))
    assert engine.infer(np.ones((3, 4), np.float32)).shape == (3, 2)


def test_varying_dimensions_compile_one_program_each() -> None:
    inputs = {
        "ids": si.InputSpec(("batch", "seq"), np.int32),
        "mask": si.InputSpec(("batch", "seq"), bool, required=False),
    }

    def model(params: object, batch: dict[str, jax.Array]) -> jax.Array:
        return jnp.where(batch.get("mask", True), batch["ids"], 0).sum(axis=1)

    engine = si.Engine(model, {}, mesh="data=2", inputs=inputs, buckets=[4])
    ids = np.arange(12).reshape(4, 3)
    np.testing.assert_array_equal(engine.infer({"ids": ids}), ids.sum(1))
    np.testing.assert_array_equal(engine.infer({"ids": ids[:, :2]}), ids[:, :2].sum(1))
    mask = ids % 2 == 0
    np.testing.assert_array_equal(engine.infer({"ids": ids, "mask": mask}), np.where(mask, ids, 0).sum(1))
    assert engine.compiles == 3
    assert engine.warmup({"seq": (2, 3, 5)}, quiet=True) == 1


def test_warmup_compiles_what_infer_needs() -> None:
    engine = si.Engine(MODEL, mesh="data=4", example=X, buckets=[4, 8, 16])
    assert engine.warmup(quiet=True) == 3
    for rows in (1, 7, 16, 50):
        engine.infer(X[:rows])
    assert engine.compiles == 3
    assert engine.compile_seconds > 0


def test_stream_keeps_order_and_reads_two_ahead_at_most() -> None:
    engine = si.Engine(MODEL, mesh="data=4,model=2", example=X, buckets=[8])
    taken = 0

    def source() -> object:
        nonlocal taken
        for start in range(0, 100, 5):
            taken += 1
            yield X[start : start + 5]

    for number, out in enumerate(engine.infer_stream(source()), start=1):
        assert taken <= number + 1
        expected = EXPECTED["y"][5 * (number - 1) : 5 * number]
        np.testing.assert_allclose(out["y"], expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert number == 20


def test_stream_gives_out_what_came_before_a_bad_batch() -> None:
    engine = si.Engine(MODEL, mesh="data=2", example=X)
    stream = engine.infer_stream([X[:3], X[:2], X[:, :5], X[:1]])
    assert len(next(stream)["y"]) == 3
    assert len(next(stream)["y"]) == 2
    with pytest.raises(BatchError, match="64"):
        next(stream)
    assert len(engine.infer(X[:1])["y"]) == 1


@pytest.mark.parametrize("mesh", ["data=1", "data=4", "data=2,model=2"])
@pytest.mark.parametrize("rows", [4, 64])
def test_the_callers_memory_survives_donation(mesh: str, rows: int) -> None:
    # Output and input have one shape, so the program may write into the input's memory.
    engine = si.Engine(lambda p, x: x * 2 + 1, {}, mesh=mesh, example=X, buckets=[rows])
    given = np.tile(X, (1, 64))[:rows, :64].copy()
    kept, on_device = given.copy(), jnp.asarray(given)
    for _ in range(3):
        np.testing.assert_array_equal(engine.infer(given), kept * 2 + 1)
        np.testing.assert_array_equal(engine.infer(on_device), kept * 2 + 1)
    np.testing.assert_array_equal(given, kept)
    np.testing.assert_array_equal(on_device, kept)
    donating = [program for program in engine.programs if "input_output_alias" in program.compiled.as_text()]
    assert len(donating) == 1


def test_meshes_of_every_form() -> None:
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    explicit = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    plan = si.plan(Annotated(rngs=nnx.Rngs(1)), devices=4, mesh="data=2,model=2", example=X)
    expected = np.asarray(Annotated(rngs=nnx.Rngs(1))(X))
    for mesh in (explicit, plan, si.MeshSpec.of(data=2, model=2), "data=2,model=2", "auto"):
        engine = si.Engine(Annotated(rngs=nnx.Rngs(1)), mesh=mesh, example=X)
        np.testing.assert_allclose(engine.infer(X), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_memory_adds_up_the_shards() -> None:
    engine = si.Engine(Annotated(rngs=nnx.Rngs(1)), mesh="data=2,model=4", example=X)
    engine.infer(X)
    use = engine.memory()
    kernels, biases = (64 * 1024 + 1024 * 32) * 4 // 4, (1024 + 32) * 4
    assert set(use.weights.values()) == {kernels + biases}
    assert use.fullest >= kernels + biases
    assert engine.dtype == np.float32


def test_threads_share_an_engine() -> None:
    engine = si.Engine(MODEL, mesh="data=2,model=2", example=X)
    wrong: list[int] = []

    def work(rows: int) -> None:
        out = engine.infer(X[:rows])["y"]
        if not np.allclose(out, EXPECTED["y"][:rows], rtol=TOLERANCE, atol=TOLERANCE):
            wrong.append(rows)

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (1, 2, 3, 4, 60, 61)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert engine.compiles == 3  # buckets 2, 4 and 64


def test_functions_of_the_model_are_compiled_once_a_shape() -> None:
    engine = si.Engine(Annotated(rngs=nnx.Rngs(1)), mesh="data=2,model=4", example=X)

    def hidden(model: Annotated, x: jax.Array, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        return si.constrain(model.up(x), "batch", "mlp"), state + 1

    step = engine.jit("hidden", hidden, donate=(1,), out_axes=(("batch", "mlp"), ("batch",)))
    state = engine.place(jax.ShapeDtypeStruct((8,), jnp.int32), ("batch",))
    x = engine.place(X[:8], ("batch", None))
    for count in range(1, 4):
        out, state = step(x, state)
        np.testing.assert_array_equal(state, np.full(8, count))
    assert out.sharding.spec == PartitionSpec("data", "model")
    assert engine.compiles == 1


def test_functions_without_arrays_are_told_apart_by_what_they_give() -> None:
    engine = si.Engine(Annotated(rngs=nnx.Rngs(1)), mesh="data=2,model=4", example=X)

    def zeros(shape: tuple[int, ...], dtype: str) -> jax.Array:
        return engine.jit("zeros", lambda _: si.constrain(jnp.zeros(shape, dtype), "batch"), out_axes=("batch",))()

    for shape, dtype in (((8,), "float32"), ((16,), "float32"), ((8,), "int32"), ((8,), "float32")):
        made = zeros(shape, dtype)
        assert (made.shape, made.dtype) == (shape, dtype)
    assert engine.compiles == 3


def test_models_that_do_not_fit_are_refused_with_the_bytes() -> None:
    abstract = {"w": jax.ShapeDtypeStruct((1 << 20, 1 << 18), jnp.float32)}
    with pytest.raises(DoesNotFitError, match=r"needs [\d,]+ bytes a device .* are available") as caught:
        si.plan(
            lambda p, x: x @ p["w"], abstract, devices="8xH100", inputs=si.InputSpec(("batch", 1 << 20), np.float32)
        )
    assert caught.value.needed_bytes > caught.value.available_bytes == 72_000_000_000
    fits = si.plan(
        lambda p, x: x @ p["w"], abstract, devices="16xH100", inputs=si.InputSpec(("batch", 1 << 20), np.float32)
    )
    assert fits.mesh.shape["model"] == 16


def test_a_model_of_ones_own_has_no_task() -> None:
    engine = si.Engine(MODEL, mesh="data=1", example=X)
    with pytest.raises(TaskError, match="cannot embed: this is a model of your own"):
        engine.embed(["text"])
    with pytest.raises(TaskError, match="no task 'translate'"):
        engine.task("translate")
    with pytest.raises(ModelError, match="cannot run a"):
        si.Engine("model")
