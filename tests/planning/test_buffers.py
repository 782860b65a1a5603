"""Memory of single operations: what is fused, what is written over, what collectives add, and how it is packed."""

import jax
import jax.numpy as jnp
import pytest

from spmd_infer.functional import model_function
from spmd_infer.planning.buffers import Effect, peak_bytes
from spmd_infer.planning.heap import Slot, alive_bytes, heap_bytes
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.values import Product

SIDE = 64
MATRIX = 4 * SIDE * SIDE


def taken(fn: object, effect: Effect | None = None, weights: int = 2, *, early: bool = False) -> float:
    """Intermediate results of ``fn(weights, x)`` with square operands, in matrices."""
    params = {f"w{i}": jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32) for i in range(weights)}
    model = model_function(fn, params)
    work = read_work(model, jax.ShapeDtypeStruct((SIDE, SIDE), jnp.float32), [("batch", None)])
    flow = work.flow
    assert flow is not None
    of_products = effect or Effect()
    return (
        peak_bytes(
            flow,
            lambda value: flow.values[value].nbytes,
            lambda item: of_products if isinstance(item, Product) else Effect(),
            early_gathers=early,
        )
        / MATRIX
    )


def two_products(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w["w0"]) @ w["w1"]


def test_elementwise_results_are_written_over_their_operands() -> None:
    assert taken(two_products) == 1


def test_what_is_used_twice_and_costly_is_stored() -> None:
    def fn(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        y = jnp.tanh(x)
        return (y @ w["w0"]) + (y.T @ w["w1"])

    assert taken(fn) >= 2  # the operand of both products, and what lies transposed for the second


def test_a_collective_needs_its_operand_and_its_result() -> None:
    assert taken(two_products, Effect(reduced=("model",))) == 2


def test_gathered_weights_live_for_their_product_or_from_the_beginning() -> None:
    def fn(w: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ w["w0"]) @ w["w1"]) @ w["w2"]

    gathered = Effect(weight=MATRIX)
    late, early = (taken(fn, gathered, weights=3, early=early) for early in (False, True))
    assert late == 2  # one weight and one intermediate result; another is where the result will be
    assert early == 3  # the weights of the later products besides


@pytest.mark.parametrize(
    ("slots", "packed"),
    [
        ([Slot(4, 0, 1), Slot(4, 2, 3)], 4),
        ([Slot(4, 0, 2), Slot(4, 2, 3)], 8),
        # The result of an all-reduce goes below its operand; what follows then finds no gap that is large enough.
        ([Slot(20, 5, 6), Slot(19, 4, 5), Slot(13, 0, 2, views=True), Slot(13, 2, 3), Slot(13, 3, 4)], 52),
    ],
)
def test_packing(slots: list[Slot], packed: int) -> None:
    assert alive_bytes(slots) <= heap_bytes(slots) == packed
