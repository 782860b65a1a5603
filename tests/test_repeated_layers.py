"""Deep models from three of their layers: the same parameters as the whole, which is built where it is called."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spmd_infer.functional import model_function
from spmd_infer.models import bert, llama
from spmd_infer.models.quantised import WeightFormat, quantised
from spmd_infer.models.registry import family_named
from spmd_infer.opening import MANY_LAYERS, abstract_model
from spmd_infer.repeated_layers import BUILT, repeated

DEPTH = MANY_LAYERS + 3
CONFIGS = {
    "llama": llama.Config(64, 16, 32, DEPTH, 4, 2, 4, context_len=32),
    "bert": bert.Config(64, 16, 32, DEPTH, 4, max_positions=32),
}


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_those_of_the_whole_model(name: str, quantize: str | None) -> None:
    family, config = family_named(name), CONFIGS[name]
    wanted = WeightFormat.parse(quantize) if quantize else None
    module = family.abstract(config)
    formats = quantised(module, wanted, jnp.float32) if wanted else {}
    whole = model_function(module)
    found, found_formats = abstract_model(family, config, wanted, jnp.float32)
    assert [*found.params] == [*whole.params]
    assert {k: (v.shape, v.dtype) for k, v in found.params.items()} == {
        k: (v.shape, v.dtype) for k, v in whole.params.items()
    }
    assert found.axes == whole.axes
    assert found_formats == formats


def test_it_computes_what_the_whole_model_does() -> None:
    module = llama.Llama(CONFIGS["llama"], rngs=nnx.Rngs(0))
    whole = model_function(module)
    found, _ = abstract_model(family_named("llama"), CONFIGS["llama"], None, jnp.float32)
    ids = {"input_ids": np.arange(8, dtype=np.int32).reshape(2, 4)}
    np.testing.assert_array_equal(found(whole.params, ids), whole(whole.params, ids))


def test_layers_are_repeated_where_they_end() -> None:
    few: dict[str, Any] = {"a": 0, **{f"layers.{i}.{x}": x for i in range(BUILT) for x in "wb"}, "z": 9}
    names = [*repeated(few, "layers", BUILT + 2)]
    assert names == ["a", *(f"layers.{i}.{x}" for i in range(BUILT + 2) for x in "wb"), "z"]
    assert jax.tree.leaves(repeated({"layers.2.w": 1}, "layers", 4)) == [1, 1]
