"""EfficientNet-Lite: logits of the PyTorch port, the same on every mesh, one all-reduce a block."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from spmd_infer.engine import Engine
from spmd_infer.errors import ModelError
from spmd_infer.models.efficientnet import VARIANTS, Config, EfficientNetLite, input_spec, name_table
from spmd_infer.models.registry import find_family
from spmd_infer.planning.audit import collectives, summary
from tests.references.efficientnet_weights import noise, seeded_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
# float32 through some fifty convolutions summed in another order, relative to the largest logit.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def saved() -> Mapping[str, np.ndarray]:
    return dict(np.load(FIXTURES / "efficientnet_logits.npz"))


def stored_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a checkpoint, from the model itself and its name table."""
    model = nnx.eval_shape(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    shapes, table = {}, name_table(config, "pth")
    for path, variable in parameters(model).items():
        entry, shape = table[path], variable.get_value().shape
        shapes[entry.name] = shape if entry.transpose is None else tuple(shape[i] for i in np.argsort(entry.transpose))
    return shapes


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}


def seeded_model(variant: str) -> EfficientNetLite:
    config = Config.variant(variant)
    model = nnx.eval_shape(lambda: EfficientNetLite(config, rngs=nnx.Rngs(0)))
    weights, table = seeded_weights(stored_shapes(config)), name_table(config, "pth")
    for path, variable in parameters(model).items():
        source = table[path]
        value = weights[source.name]
        variable.set_value(jax.numpy.asarray(value if source.transpose is None else value.transpose(source.transpose)))
    return model


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.demo
def test_real_weights_on_every_mesh(mesh_text: str, efficientnet: Path, saved: Mapping[str, np.ndarray]) -> None:
    engine = Engine.load(efficientnet, mesh=mesh_text, buckets=[8])
    images = np.concatenate([noise(224, 2)] * 4)
    logits = engine.infer({"image": images})
    assert relative_error(logits[:2], saved["lite0"]) < TOLERANCE
    assert relative_error(logits[6:], saved["lite0"]) < TOLERANCE
    (program,) = engine.programs
    found = collectives(program.compiled)
    parts = dict(engine.mesh.shape)
    print(f"\n{parts}: {summary(found, engine.mesh)}")
    counted = Counter((each.kind, *each.axes(engine.mesh)) for each in found)
    if parts["model"] == 1:
        assert not counted
        return
    rows = 8 // parts["data"]
    blocks = len(Config().blocks())
    assert counted == {("all-reduce", "model"): blocks, ("all-gather", "model"): 1}
    # Each block's output is summed once and nothing else is: sizes of the 16 outputs at 224×224.
    sizes = {1: 112, 2: 56, 3: 56, 4: 28, 5: 28, **dict.fromkeys(range(6, 12), 14), **dict.fromkeys(range(12, 17), 7)}
    outputs = [sizes[i] ** 2 * block.outputs * rows * 4 for i, block in enumerate(Config().blocks(), start=1)]
    assert sum(each.nbytes for each in found if each.kind == "all-reduce") == sum(outputs)
    assert sum(each.nbytes for each in found if each.kind == "all-gather") == rows * 1280 * 4


@pytest.mark.demo
def test_channels_that_the_mesh_does_not_divide(efficientnet: Path, saved: Mapping[str, np.ndarray]) -> None:
    """Of the channel counts only 240 and 480 (and the head's 1,280) are multiples of 5: the others stay whole."""
    engine = Engine.load(efficientnet, mesh="data=1,model=5", buckets=[2])
    assert relative_error(engine.infer({"image": noise(224, 2)}), saved["lite0"]) < TOLERANCE
    whole = {layout.path for layout in engine.plan.weights if layout.whole}
    assert "blocks.2.expand_conv.weight" in whole  # 144 channels
    assert "blocks.4.expand_conv.weight" not in whole  # 240 channels


@pytest.mark.demo
def test_bfloat16(efficientnet: Path, saved: Mapping[str, np.ndarray]) -> None:
    engine = Engine.load(efficientnet, mesh="data=2,model=4", dtype="bfloat16", buckets=[2])
    logits = engine.infer({"image": noise(224, 2)})
    assert logits.dtype == np.float32
    # bfloat16 rounds to 1 in 256, some fifty times over; measured 0.03.
    assert relative_error(logits, saved["lite0"]) < 0.08
    assert (logits.argmax(-1) == saved["lite0"].argmax(-1)).all()


@pytest.mark.parametrize("variant", ["lite1", "lite4"])
def test_logits_of_larger_variants(variant: str, saved: Mapping[str, np.ndarray]) -> None:
    model = seeded_model(variant)
    size = VARIANTS[variant][2]
    engine = Engine(model, mesh="data=1", inputs=input_spec(Config.variant(variant)), buckets=[1])
    assert relative_error(engine.infer({"image": noise(size, 1)}), saved[variant]) < TOLERANCE


def test_split_by_columns_of_the_image(saved: Mapping[str, np.ndarray]) -> None:
    """An edge from each side for every convolution, until 15 columns do not divide: those are brought together once."""
    model = seeded_model("lite1")
    engine = Engine(model, mesh="seq=2", inputs=input_spec(Config.variant("lite1")), buckets=[1])
    assert relative_error(engine.infer({"image": noise(240, 1)}), saved["lite1"]) < TOLERANCE
    (program,) = engine.programs
    counted = Counter((each.kind, *each.axes(engine.mesh)) for each in collectives(program.compiled))
    assert counted.pop(("collective-permute", "seq")) < 2 * len(model.blocks)
    assert counted == {("all-gather", "seq"): 1, ("all-reduce", "seq"): 1}  # the latter for the mean over the image


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_state_dict_is_recognised(variant: str) -> None:
    shapes = stored_shapes(Config.variant(variant, num_classes=21))
    family, config = find_family(None, {**shapes, "_bn0.num_batches_tracked": ()})
    assert family.name == "efficientnet-lite"
    assert config == Config.variant(variant, num_classes=21)


def test_other_state_dicts_are_not() -> None:
    shapes = stored_shapes(Config())
    assert Config.from_shapes({**shapes, "_blocks.1._se_reduce.weight": (4, 96, 1, 1)}) is None
    assert Config.from_shapes({**shapes, "_blocks.3._depthwise_conv.weight": (144, 1, 3, 3)}) is None
    assert Config.from_shapes({k: v for k, v in shapes.items() if k != "_bn1.bias"}) is None
    assert Config.from_shapes({"_fc.weight": (1000,)}) is None


def test_config_from_json() -> None:
    config = Config.from_hf({"width_coefficient": 1.1, "depth_coefficient": 1.2, "image_size": 260, "num_labels": 5})
    assert config == Config.variant("lite2", num_classes=5)
    with pytest.raises(ModelError, match="no variant 'b0'; known are lite0, lite1, lite2, lite3, lite4"):
        Config.variant("b0")


@pytest.mark.parity
@pytest.mark.parametrize("variant", ["lite0", "lite1"])
def test_logits_equal_the_port_now(variant: str, efficientnet: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("efficientnet_lite_pytorch")
    from tests.references import efficientnet_logits as port

    images = np.random.default_rng(1).uniform(-1, 1, (2, *[VARIANTS[variant][2]] * 2, 3)).astype(np.float32)
    assert port.image_size(variant) == VARIANTS[variant][2]
    if variant == "lite0":
        engine = Engine.load(efficientnet, mesh="data=1")
        weights = port.real_weights(efficientnet)
    else:
        engine = Engine(seeded_model(variant), mesh="data=1", inputs=input_spec(Config.variant(variant)))
        weights = seeded_weights(port.shapes(variant))
    assert relative_error(engine.infer({"image": images}), port.logits(variant, weights, images)) < TOLERANCE
