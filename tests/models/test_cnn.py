"""The small CNN: right, the same however it is split, and with the collectives that the split implies."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from spmd_infer.axes import AxisRules
from spmd_infer.engine import Engine
from spmd_infer.errors import ModelError
from spmd_infer.models.cnn import Config, SmallCNN, input_spec
from spmd_infer.planning.audit import Collective, collectives, summary

FIXTURES = Path(__file__).parents[1] / "fixtures"
# float32 sums of 576 and 4,096 products in another order, relative to the largest logit.
TOLERANCE = 1e-5
BATCH = 16
LOGITS = BATCH * 10 * 4  # bytes

# name, mesh, changed rules, {(kind, mesh axis): how many}
SPATIAL = [
    ("rows", "seq=8", {"height": "seq", "width": None}, {("collective-permute", "seq"): 4, ("all-reduce", "seq"): 1}),
    ("columns", "seq=8", {"width": "seq"}, {("collective-permute", "seq"): 4, ("all-reduce", "seq"): 1}),
    (
        "blocks",
        "seq=4,model=2",
        {"height": "seq", "width": "model", "channels": None},
        {
            ("collective-permute", "seq"): 4,
            ("collective-permute", "model"): 4,
            ("all-reduce", "seq"): 1,
            ("all-reduce", "model"): 1,
        },
    ),
    (
        "batch and rows",
        "data=2,seq=4",
        {"height": "seq", "width": None},
        {("collective-permute", "seq"): 4, ("all-reduce", "seq"): 1},
    ),
    ("input channels", "model=8", {"embed": "model", "channels": None}, {("all-reduce", "model"): 1}),
]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(0, 1, (BATCH, 32, 32, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(images: np.ndarray) -> np.ndarray:
    return random_engine("data=1", AxisRules()).infer({"image": images})


def random_engine(mesh: str, rules: AxisRules) -> Engine:
    config = Config()
    model = SmallCNN(config, rngs=nnx.Rngs(0))
    return Engine(model, mesh=mesh, rules=rules, inputs=input_spec(config), buckets=[BATCH])


def compiled_collectives(engine: Engine) -> list[Collective]:
    """What XLA put into the engine's one program; printed, so that -s shows it."""
    (program,) = engine.programs
    found = collectives(program.compiled)
    print(f"\n{dict(engine.mesh.shape)}: {summary(found, engine.mesh)}")
    return found


def counted(engine: Engine, found: list[Collective]) -> dict[tuple[str, str], int]:
    return dict(Counter((each.kind, "+".join(each.axes(engine.mesh))) for each in found))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def test_logits_equal_torch() -> None:
    saved = np.load(FIXTURES / "vision_cnn.npz")
    engine = Engine.load(FIXTURES / "digits_cnn", mesh="data=1")
    assert relative_error(engine.infer({"image": saved["images"]}), saved["logits"]) < TOLERANCE


def test_batch_and_output_channels(mesh_text: str, images: np.ndarray, whole: np.ndarray) -> None:
    engine = random_engine(mesh_text, AxisRules())
    assert relative_error(engine.infer({"image": images}), whole) < TOLERANCE
    found = compiled_collectives(engine)
    parts = dict(engine.mesh.shape)
    if parts["model"] == 1:
        assert found == []
    else:
        assert counted(engine, found) == {("all-reduce", "model"): 1}
        assert found[0].nbytes == LOGITS // parts["data"]


@pytest.mark.parametrize(("mesh", "changes", "expected"), [s[1:] for s in SPATIAL], ids=[s[0] for s in SPATIAL])
def test_other_splits(
    mesh: str,
    changes: dict[str, str | None],
    expected: dict[tuple[str, str], int],
    images: np.ndarray,
    whole: np.ndarray,
) -> None:
    engine = random_engine(mesh, AxisRules().replace(**changes))
    assert relative_error(engine.infer({"image": images}), whole) < TOLERANCE
    found = compiled_collectives(engine)
    assert counted(engine, found) == expected
    # A halo is one row or column of a part of the image, on each side of each of two convolutions: small against
    # the activations, which would be gathered if XLA had not understood the layout.
    activations = BATCH * 32 * 32 * 32 * 4 // dict(engine.mesh.shape).get("data", 1)
    assert sum(each.nbytes for each in found if each.kind == "collective-permute") < activations / 4


def test_config_from_json_and_from_shapes() -> None:
    config = Config.from_hf({"num_channels": 3, "hidden_sizes": [8, 16], "id2label": {"0": "cat", "1": "dog"}})
    assert config == Config(num_channels=3, hidden_sizes=(8, 16), num_classes=2)
    shapes = {
        "conv1.weight": (8, 3, 3, 3),
        "conv1.bias": (8,),
        "conv2.weight": (16, 8, 3, 3),
        "conv2.bias": (16,),
        "head.weight": (2, 16, 8, 8),
        "head.bias": (2,),
    }
    assert Config.from_shapes(shapes) == config
    assert Config.from_shapes({**shapes, "conv3.weight": (4, 4, 3, 3)}) is None
    assert Config.from_shapes({**shapes, "conv2.weight": (16, 9, 3, 3)}) is None
    assert Config.from_shapes({**shapes, "head.weight": (2, 16, 0, 0)}) is None
    assert Config.from_shapes({}) is None


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError, match="pool_size 5 does not divide image_size 32"):
        Config(pool_size=5)
    with pytest.raises(ModelError, match=r"two convolutions, but hidden_sizes is \(8,\)"):
        Config.from_hf({"hidden_sizes": [8]})
