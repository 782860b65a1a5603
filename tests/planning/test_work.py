"""The work read off a jaxpr, against XLA's own count and against arithmetic done by hand."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd_infer.functional import ModelFunction, model_function
from spmd_infer.models.llama import Config, Llama
from spmd_infer.planning.buffers import Effect, peak_bytes
from spmd_infer.planning.tracing import read_work

LLAMA = Config(
    vocab_size=512, embed_dim=64, mlp_dim=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, context_len=64
)


def llama() -> ModelFunction:
    return model_function(nnx.eval_shape(lambda: Llama(LLAMA, rngs=nnx.Rngs(0))))


def test_flops_of_a_decoder_agree_with_xla() -> None:
    model = llama()
    ids = jax.ShapeDtypeStruct((4, 32), jnp.int32)
    work = read_work(model, {"input_ids": ids}, [("batch", "seq")])
    compiled = jax.jit(model).lower(model.params, {"input_ids": ids}).compile()
    analysis = compiled.cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    # XLA also counts the elementwise operations: a few percent at this width.
    assert 0.85 < work.flops / counted <= 1.02


def test_convolutions_and_scans() -> None:
    def scanned(params: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, w: (carry @ w, None), x, params)[0]

    model = model_function(scanned, jnp.ones((5, 8, 8)))
    work = read_work(model, jax.ShapeDtypeStruct((3, 8), jnp.float32), [("batch", None)])
    assert work.flops == 5 * 2 * 3 * 8 * 8

    def convolved(params: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, params, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    model = model_function(convolved, jnp.ones((3, 3, 4, 6)))
    work = read_work(model, jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32), [("batch", "height", "width", None)])
    assert work.flops == 2 * (2 * 8 * 8 * 6) * (3 * 3 * 4)
    (product,) = work.products
    assert product.out.labels == ("batch", "height", "width", "params#3")


def test_labels_travel_from_weights_to_sums() -> None:
    work = read_work(llama(), {"input_ids": jax.ShapeDtypeStruct((4, 32), jnp.int32)}, [("batch", "seq")])
    weighed = [p for p in work.products if len(p.right.labels) == 2 and p.flops]
    summed = Counter()
    for product in weighed:
        summed.update({product.right.labels[b]: product.times for _, b in product.summed_dimensions})
    # q, k, v, gate, up and the head contract the residual width; o and down what the rules split.
    assert summed == {"heads": LLAMA.num_layers, "mlp": LLAMA.num_layers, "embed": 5 * LLAMA.num_layers + 1}
    assert work.outputs[0].labels[0] == "batch"
    assert work.outputs[0].labels[-1] == "vocab"


@pytest.mark.parametrize("length", [1, 2, 7])
def test_lives_of_values(length: int) -> None:
    def chain(params: object, x: jax.Array) -> jax.Array:
        for _ in range(length):
            x = jnp.tanh(x)
        return x

    work = read_work(model_function(chain, {}), jax.ShapeDtypeStruct((10, 10), np.float32), [("batch", None)])
    assert work.flow is not None
    taken = peak_bytes(work.flow, lambda value: work.flow.values[value].nbytes, lambda item: Effect())
    # One loop from the caller's operand to the caller's result; a costly operation in between is no reason to store.
    assert taken == 0
