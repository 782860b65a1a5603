"""Windows over images in parts: the edges that travel, what is brought together, and the memory of both."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from spmd_infer.axes import BATCH, HEIGHT, WIDTH, AxisRules
from spmd_infer.functional import model_function
from spmd_infer.models.convolution import Conv, DepthwiseConv
from spmd_infer.planning.messages import completion, of_window
from spmd_infer.planning.splits import Splits
from spmd_infer.planning.tracing import read_work
from spmd_infer.planning.values import Value, Window
from spmd_infer.planning.windows import spelled_out

MESH = {"data": 2, "seq": 4}
BLOCKS = AxisRules().replace(height="data", batch=None)
AXES = (BATCH, HEIGHT, WIDTH, None)


def splits() -> Splits:
    return Splits(BLOCKS, MESH, ())


def window(height: int, width: int, reach: tuple[int, int, int]) -> Window:
    value = Value((2, height, width, 8), jnp.float32, AXES)
    return Window(value, ((1, *reach), (2, *reach)))


def test_later_edges_run_along_the_earlier_ones() -> None:
    needed = completion(window(16, 16, (1, 1, 1)), splits())
    row, column = 2 * 4 * 8 * 4, 2 * 10 * 8 * 4  # bytes; a column is two places longer for the rows above and below
    assert needed.edges == (("data", (row, row)), ("seq", (column, column)))
    assert needed.shape == (2, 10, 6, 8)
    assert needed.gathered == ()


@pytest.mark.parametrize(
    ("height", "width", "reach", "gathered"),
    [
        (16, 28, (1, 2, 2), ("seq",)),  # parts of 7 columns and a stride of 2
        (16, 8, (3, 3, 1), ("seq",)),  # windows reach beyond the neighbour's 2 columns
        (14, 28, (1, 2, 2), ("data", "seq")),
        (16, 30, (1, 1, 1), ()),  # 30 columns stay whole from the beginning
    ],
)
def test_what_has_no_even_parts_is_gathered(
    height: int, width: int, reach: tuple[int, int, int], gathered: tuple[str, ...]
) -> None:
    messages = [m for m in of_window(window(height, width, reach), splits()) if m.kind == "all-gather"]
    assert tuple(axis for m in messages for axis in m.axes) == gathered
    if gathered:
        whole = {"seq": width, "data": height}
        assert messages[-1].nbytes == 2 * 8 * 4 * height * width // (1 if len(gathered) == 2 else 2)
        assert whole.keys() >= set(gathered)


@pytest.mark.parametrize("depthwise", [False, True])
def test_convolutions_are_found_in_a_model(depthwise: bool) -> None:
    conv: Conv | DepthwiseConv = (
        DepthwiseConv(8, 3, axis=None, rngs=nnx.Rngs(0))
        if depthwise
        else Conv(8, 16, 3, axes=(None, None, None, None), rngs=nnx.Rngs(0))
    )
    work = read_work(model_function(conv), jax.ShapeDtypeStruct((2, 16, 16, 8), jnp.float32), [AXES])
    (found,) = work.windows
    assert found.reaches == ((1, 1, 1, 1), (2, 1, 1, 1))
    assert found.value.labels == AXES
    flow = work.flow
    assert flow is not None
    spelled, size = spelled_out(
        flow, lambda v: splits().device_bytes(flow.values[v]), lambda w: completion(w, splits())
    )
    sent = [op.outputs[0] for op in spelled.ops if op.kind == "collective"]
    assert [size(value) for value in sent] == [2 * 4 * 8 * 4] * 2 + [2 * 10 * 8 * 4] * 2
    completed = 2 * 10 * 6 * 8 * 4
    whole = [value for op in spelled.ops for value in op.outputs if op.kind == "move" and size(value) == completed]
    assert len(whole) == 1  # no zeros are put around it once more


def test_an_image_in_one_piece_needs_nothing() -> None:
    one = Splits(BLOCKS, {"data": 1, "seq": 1}, ())
    assert list(of_window(window(16, 16, (1, 1, 1)), one)) == []
