import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd_infer.errors import ModelError
from spmd_infer.functional import model_function

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(4, 8, rngs=rngs, kernel_metadata={"axes": ("embed", "mlp")})
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        return self.drop(self.norm(self.inner(x))) * scale


def test_nnx_axes_paths_and_values() -> None:
    block = Block(rngs=nnx.Rngs(0))
    function = model_function(block)
    assert function.kind == "nnx"
    assert function.axes == {"inner.kernel": ("embed", "mlp")}
    assert {"inner.kernel", "inner.bias", "norm.scale", "norm.mean"} <= function.params.keys()
    out = function(function.params, X)
    assert not block.drop.deterministic  # the caller's module keeps its own mode
    block.eval()
    np.testing.assert_array_equal(out, block(X))


def test_nnx_other_parameters_and_abstract_models() -> None:
    abstract = nnx.eval_shape(lambda: Block(rngs=nnx.Rngs(0)))
    other = Block(rngs=nnx.Rngs(1))
    function = model_function(abstract, nnx.state(other))
    other.eval()
    np.testing.assert_array_equal(function(function.params, X), other(X))
    with pytest.raises(ModelError, match=r"1 missing \['inner.bias'\]"):
        model_function(abstract, {k: v for k, v in function.params.items() if k != "inner.bias"})
    with pytest.raises(ModelError, match=r"'inner.bias' of Block: expected shape \(8,\), got \(9,\)"):
        model_function(abstract, {**function.params, "inner.bias": np.zeros(9)})


def test_batches_become_arguments() -> None:
    function = model_function(Block(rngs=nnx.Rngs(0)))
    plain = function(function.params, X)
    np.testing.assert_array_equal(function(function.params, {"x": X}), plain)
    np.testing.assert_array_equal(function(function.params, (X, 2.0)), plain * 2)
    fixed = model_function(Block(rngs=nnx.Rngs(0)), call_kwargs={"scale": 3.0})
    np.testing.assert_allclose(fixed(fixed.params, X), plain * 3, rtol=1e-6)


def test_linen_with_and_without_annotations() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
            init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
            return nn.Dropout(0.5, deterministic=not train)(nn.Dense(8, kernel_init=init)(x))

    net = Net()
    variables = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    function = model_function(net, variables, call_kwargs={"train": False})
    assert function.axes == {"params.Dense_0.kernel": ("embed", "mlp")}
    np.testing.assert_array_equal(function(function.params, X), net.apply(variables, X, train=False))
    with pytest.raises(ModelError, match="Net needs its variables"):
        model_function(net)


def test_functions_with_any_tree_of_parameters() -> None:
    params = {"layers": [jnp.ones((4, 2)), jnp.ones((2, 2))], "bias": jnp.ones(2)}
    function = model_function(lambda p, x: x @ p["layers"][0] @ p["layers"][1] + p["bias"], params)
    assert set(function.params) == {"layers.0", "layers.1", "bias"}
    np.testing.assert_allclose(function(function.params, X), X @ np.ones((4, 2)) @ np.ones((2, 2)) + 1, rtol=1e-6)
    with pytest.raises(ModelError, match="parameter 'a' is a str"):
        model_function(lambda p, x: x, {"a": "text"})


def test_other_things_are_refused() -> None:
    with pytest.raises(ModelError, match="cannot run a int"):
        model_function(3)
