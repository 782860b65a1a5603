"""Bad batches: each gets an error that says what was expected and what came, and the engine stays usable."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.errors import BatchError, SpmdInferError


def model(params: dict[str, jax.Array], batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.take(params["table"], batch["ids"], axis=0).sum(axis=1) * batch["scale"][:, None]


INPUTS = {"ids": si.InputSpec(("batch", "seq"), np.int32), "scale": si.InputSpec(("batch",), np.float32)}
TAKES = "the model takes 'ids': int32[batch, seq], 'scale': float32[batch]"
IDS, SCALE = np.zeros((3, 4), np.int32), np.ones(3, np.float32)

CASES: dict[str, tuple[Any, str]] = {
    "missing key": ({"ids": IDS}, f"wrong keys in the batch: missing ['scale']; {TAKES}"),
    "unknown key": ({"ids": IDS, "scale": SCALE, "mask": IDS}, f"wrong keys in the batch: unknown ['mask']; {TAKES}"),
    "both": ({"id": IDS, "scale": SCALE}, "missing ['ids'], unknown ['id']"),
    "array for dict": (IDS, "the batch has structure PyTreeDef(*), expected PyTreeDef({'ids': *, 'scale': *})"),
    "tuple for dict": ((IDS, SCALE), "the batch has structure PyTreeDef((*, *)), expected"),
    "nested": ({"ids": {"a": IDS}, "scale": SCALE}, "the batch has structure"),
    "nothing": (None, f"the batch is empty; {TAKES}"),
    "empty dict": ({}, f"the batch is empty; {TAKES}"),
    "no rows": ({"ids": IDS[:0], "scale": SCALE[:0]}, "the batch has 0 rows"),
    "empty rows": ({"ids": IDS[:, :0], "scale": SCALE}, "'seq' is 0"),
    "rank too low": (
        {"ids": IDS[0], "scale": SCALE},
        "input 'ids': expected int32[batch, seq], got int32[4]: 1 dimensions",
    ),
    "rank too high": ({"ids": IDS[None], "scale": SCALE}, "got int32[1, 3, 4]: 3 dimensions where 2 were expected"),
    "scalar": (
        {"ids": IDS, "scale": np.float32(1)},
        "input 'scale': expected float32[batch], got float32[]: 0 dimensions",
    ),
    "rows differ": ({"ids": IDS, "scale": SCALE[:2]}, "'batch' is 2 here but 3 in an earlier input"),
    "float for int": (
        {"ids": IDS.astype(np.float32), "scale": SCALE},
        "input 'ids': expected dtype int32, got float32",
    ),
    "int for float": ({"ids": IDS, "scale": IDS[:, 0]}, "input 'scale': expected dtype float32, got int32"),
    "bool for int": ({"ids": IDS > 0, "scale": SCALE}, "input 'ids': expected dtype int32, got bool"),
    "too large an int": (
        {"ids": IDS.astype(np.int64) + 2**40, "scale": SCALE},
        "values 1099511627776 to 1099511627776 of dtype int64 do not fit int32 (-2147483648 to 2147483647)",
    ),
    "complex": ({"ids": IDS, "scale": SCALE.astype(np.complex64)}, "expected dtype float32, got complex64"),
    "text": ({"ids": np.array(["a", "b"]), "scale": SCALE}, "input 'ids': expected dtype int32, got str32"),
    "words": ({"ids": "hello", "scale": SCALE}, "input 'ids' has dtype <U5; expected an array of numbers"),
    "objects": ({"ids": np.array([object()]), "scale": SCALE}, "expected dtype int32, got object"),
    "ragged list": ({"ids": [[1, 2], [3]], "scale": [1.0, 2.0]}, "input 'ids' is ragged"),
    "none inside": ({"ids": None, "scale": SCALE}, "the batch has structure"),
}


@pytest.fixture(scope="module")
def engine() -> si.Engine:
    params = {"table": np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)}
    return si.Engine(model, params, mesh="data=2,model=2", inputs=INPUTS)


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_reason(engine: si.Engine, name: str) -> None:
    batch, message = CASES[name]
    with pytest.raises(BatchError, match=re.escape(message)) as caught:
        engine.infer(batch)
    assert isinstance(caught.value, SpmdInferError)
    assert isinstance(caught.value, ValueError)
    assert engine.infer({"ids": IDS, "scale": SCALE}).shape == (3, 8)


def test_what_can_be_taken_is_taken(engine: si.Engine) -> None:
    plain = engine.infer({"ids": IDS, "scale": SCALE})
    for batch in (
        {"ids": IDS.astype(np.int64), "scale": SCALE.astype(np.float64)},
        {"ids": IDS.tolist(), "scale": SCALE.tolist()},
        {"ids": IDS.astype(np.uint8), "scale": jnp.asarray(SCALE)},
    ):
        np.testing.assert_array_equal(engine.infer(batch), plain)


def test_a_model_that_fails_says_on_what() -> None:
    engine = si.Engine(
        lambda p, x: x @ p, jnp.ones((4, 2)), mesh="data=2", inputs=si.InputSpec(("batch", "n"), np.float32)
    )
    with pytest.raises(BatchError, match=r"<lambda> does not accept inputs float32\[2, 3\]: .*dot_general"):
        engine.infer(np.ones((1, 3), np.float32))
    assert engine.infer(np.ones((1, 4), np.float32)).shape == (1, 2)


def test_an_output_that_mixes_rows_is_refused() -> None:
    engine = si.Engine(lambda p, x: {"y": x, "loss": x.mean()}, {}, mesh="data=2", example=np.ones((1, 4), np.float32))
    with pytest.raises(BatchError, match=r"output \['loss'\] has shape \[\] for 4 rows .* aggregate="):
        engine.infer(np.ones((3, 4), np.float32))


def test_inputs_without_rows_are_refused() -> None:
    with pytest.raises(BatchError, match="none of the inputs has a 'batch' dimension"):
        si.Engine(lambda p, x: x, {}, mesh="data=1", inputs=si.InputSpec((4,), np.float32))
    with pytest.raises(BatchError, match="buckets are batch sizes of 1 or more"):
        si.Engine(lambda p, x: x, {}, mesh="data=1", buckets=[0, 4])
