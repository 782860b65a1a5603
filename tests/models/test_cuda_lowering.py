"""What NVIDIA GPUs are given, read from programs lowered for them: operands that their libraries multiply fast.

No GPU is needed to lower a program, and none is asked: what the device is, is told.
"""

import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spmd_infer import axes
from spmd_infer.errors import ModelError
from spmd_infer.functional import model_function
from spmd_infer.models import dense, prompt_attention
from spmd_infer.models.attention import causal_attention
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.chunk_attention import ChunkCache
from spmd_infer.models.llama import Config, Llama
from spmd_infer.models.quantised import WeightFormat, quantised

CONFIG = Config(512, 256, 512, 2, 4, 2, 64, 256)
HOPPER = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3")
PROJECTIONS = 7 * CONFIG.num_layers + 1  # and the head
_PRODUCT = re.compile(
    r"stablehlo\.dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> tensor<[\dx]*x(\w+)>"
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, HOPPER)


def told(monkeypatch: pytest.MonkeyPatch, device: SimpleNamespace) -> None:
    """Let models be traced as for this device."""
    for module in (axes, dense):
        monkeypatch.setattr(module, "current_device", lambda: device)


def lowered(fn: Any, *args: Any) -> str:
    text: str = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text


def products(kind: str | None, rows: int) -> Counter[tuple[str, ...]]:
    """Operands and results of a model's products by dtype, for one token of each of ``rows`` rows."""
    module = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    if kind is not None:
        quantised(module, WeightFormat.parse(kind), jnp.bfloat16)
    function = model_function(module)
    params = {
        path: jax.ShapeDtypeStruct(
            p.shape, jnp.bfloat16 if p.dtype == jnp.float32 and not path.endswith("_scale") else p.dtype
        )
        for path, p in function.params.items()
    }
    ids = jax.ShapeDtypeStruct((rows, 1), jnp.int32)
    text = lowered(lambda weights, ids: function.rebuild(weights)(ids), params, ids)
    return Counter(_PRODUCT.findall(text))


@pytest.mark.parametrize("rows", [1, 128])
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        (None, ("bf16", "bf16", "f32")),
        ("int8", ("i8", "i8", "i32")),  # cuBLASLt sums int8 in int32 only
        ("fp8", ("f8E4M3FN", "f8E4M3FN", "f32")),  # real float8 operands: XLA then calls __cublas$lt$matmul$f8
    ],
)
@pytest.mark.usefixtures("on_hopper")
def test_projections_multiply_what_the_weights_hold(kind: str | None, dtypes: tuple[str, ...], rows: int) -> None:
    found = products(kind, rows)
    attention = 2 * CONFIG.num_layers  # scores and weighted values, in bfloat16
    turned = found.total() - PROJECTIONS - attention  # int8: what is rounded is turned by a small matrix first
    assert found[dtypes] == PROJECTIONS + (attention if kind is None else 0)
    assert (turned > 0) == (kind == "int8")


@pytest.mark.usefixtures("on_hopper")
def test_fp8_products_are_as_cublaslt_wants_them() -> None:
    """Both operands contracted on their last dimension (the only layout of float8), which is a multiple of 16."""
    x, weight = jax.ShapeDtypeStruct((32, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((14336, 4096), jnp.float8_e4m3fn)
    text = lowered(dense.dense, x, weight, jax.ShapeDtypeStruct((14336,), jnp.float32))
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert "contracting_dims = [1] x [1]" in product
    assert "tensor<32x4096xf8E4M3FN>, tensor<14336x4096xf8E4M3FN>" in product


def test_older_gpus_multiply_float8_in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    told(monkeypatch, SimpleNamespace(platform="gpu", compute_capability="8.0"))
    assert products("fp8", 4)["bf16", "bf16", "f32"] >= PROJECTIONS


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN as it would answer on a Hopper GPU; the names are private to JAX."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)


@pytest.mark.usefixtures("on_hopper", "cudnn")
@pytest.mark.parametrize("name", ["bfloat16", "fp8"])
def test_prompts_go_to_cudnn(name: str) -> None:
    """Llama 3.1 8B's heads, whatever the cache holds."""
    fmt = CacheFormat.of(name, "gpu", jnp.bfloat16)

    def attend(queries: jax.Array, keys: jax.Array, values: jax.Array, starts: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(queries.shape[1]), queries.shape[:2])
        return ChunkCache(starts, fmt, way="cudnn").attend(queries, keys, values, positions)[0]

    queries, keys = (jax.ShapeDtypeStruct((4, 2048, heads, 128), jnp.bfloat16) for heads in (32, 8))
    text = lowered(attend, queries, keys, keys, jax.ShapeDtypeStruct((4,), jnp.int32))
    assert len(re.findall(r"custom_call @__cudnn\$fmhaSoftmax\(", text)) == 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("dtype", "width", "message"), [("float32", 128, "queries are float32"), ("bfloat16", 100, "heads of 100 numbers")]
)
def test_cudnn_is_not_asked_for_what_it_cannot_do(dtype: str, width: int, message: str) -> None:
    queries = jax.ShapeDtypeStruct((1, 64, 4, width), jnp.dtype(dtype))
    with pytest.raises(ModelError, match=message):
        lowered(prompt_attention.cudnn_attention, queries, queries, queries)


def test_cudnn_is_for_nvidia_gpus() -> None:
    queries = jnp.zeros((1, 64, 4, 64), jnp.bfloat16)
    with pytest.raises(ModelError, match=r"the devices are no NVIDIA GPUs"):
        prompt_attention.cudnn_attention(queries, queries, queries)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
class TestOnTheGPU:
    """The same, compiled and run; ``benchmarks/gpu.sh`` runs them."""

    @pytest.mark.parametrize(("kind", "call"), [("fp8", r"__cublas\$lt\$matmul\$f8"), ("int8", "__cublas")])
    def test_libraries_multiply(self, kind: str, call: str) -> None:
        x, weight = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate([(64, 1024), (2048, 1024)]))
        numbers, scale = dense.quantise_weight(weight, kind)
        compiled = jax.jit(dense.dense).lower(x.astype(jnp.bfloat16), numbers, scale).compile()
        assert re.search(call, compiled.as_text())
        expected = x @ weight.T
        found = compiled(x.astype(jnp.bfloat16), numbers, scale)
        assert jnp.linalg.norm(found - expected) < 0.06 * jnp.linalg.norm(expected)

    def test_cudnn_equals_xla(self) -> None:
        queries, keys, values = (
            jax.random.normal(jax.random.key(heads), (2, 512, heads, 128), jnp.bfloat16) for heads in (32, 8, 8)
        )
        compiled = jax.jit(prompt_attention.cudnn_attention).lower(queries, keys, values).compile()
        assert "__cudnn$fmha" in compiled.as_text()
        expected = causal_attention(queries, keys, values).astype(jnp.float32)
        found = compiled(queries, keys, values).astype(jnp.float32)
        assert jnp.abs(found - expected).max() < 0.02 * jnp.abs(expected).max()
