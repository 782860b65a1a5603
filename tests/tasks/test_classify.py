"""Pictures to names: accuracy on real pictures, order, and what is said of pictures that cannot be read."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from spmd_infer.engine import Engine
from spmd_infer.errors import BatchError, TaskError
from spmd_infer.tasks import classify
from spmd_infer.tasks.classify import Label, class_names, imagenet_names
from spmd_infer.tasks.images import Preprocessing

DIGITS_CNN = Path(__file__).parents[1] / "fixtures" / "digits_cnn"


@pytest.fixture(scope="module")
def digits_engine() -> Engine:
    return Engine.load(DIGITS_CNN, mesh="data=2,model=2")


@pytest.fixture(scope="module")
def held_back() -> tuple[list[np.ndarray], np.ndarray]:
    """The digits that the fixture's weights were not trained on."""
    data = load_digits()
    pictures = list((data.images * (255 / 16)).astype(np.uint8))
    _, pictures, _, labels = train_test_split(pictures, data.target, test_size=0.25, random_state=0)
    return pictures, labels


def top1(labels: Iterable[list[Label]], true: Iterable[int]) -> int:
    return sum(found[0].index == index for found, index in zip(labels, true, strict=True))


@pytest.mark.demo
@pytest.mark.parametrize("mesh", ["data=1", "data=2,model=4"])
def test_imagenet_pictures(mesh: str, efficientnet: Path, imagenet_pictures: list[tuple[Path, int]]) -> None:
    engine = Engine.load(efficientnet, mesh=mesh)
    paths, true = [path for path, _ in imagenet_pictures], [index for _, index in imagenet_pictures]
    labels = engine.classify(paths)
    assert top1(labels, true) == 18
    assert sum(index in [label.index for label in found] for found, index in zip(labels, true, strict=True)) == 19
    assert labels[0][0].name == "bull mastiff"
    assert all(found == sorted(found, key=lambda label: -label.score) for found in labels)


@pytest.mark.demo
def test_paths_images_and_arrays_are_one(efficientnet: Path, imagenet_pictures: list[tuple[Path, int]]) -> None:
    engine = Engine.load(efficientnet, mesh="data=1", buckets=[4])
    path = imagenet_pictures[0][0]
    with Image.open(path) as image:
        pictures = [path, str(path), image, np.asarray(image)]
        first, *others = engine.classify(pictures, top=2)
    assert all(labels == first for labels in others)


def test_digits(digits_engine: Engine, held_back: tuple[list[np.ndarray], np.ndarray]) -> None:
    pictures, true = held_back
    labels = digits_engine.classify(pictures, top=10)
    assert top1(labels, true) / len(true) >= 0.97
    assert [label.name for label in labels[0]] == [str(label.index) for label in labels[0]]
    assert sum(label.score for label in labels[0]) == pytest.approx(1, abs=1e-6)


def test_one_array_of_several_pictures(digits_engine: Engine, held_back: tuple[list[np.ndarray], np.ndarray]) -> None:
    pictures = held_back[0][:5]
    listed = digits_engine.classify(pictures, top=1)
    assert digits_engine.classify(np.stack(pictures), top=1) == listed
    assert digits_engine.classify(np.stack(pictures)[..., None], top=1) == listed
    as_floats = digits_engine.classify([picture / 255 for picture in pictures], top=1)
    for (found,), (expected,) in zip(as_floats, listed, strict=True):
        assert found.index == expected.index
        assert found.score == pytest.approx(expected.score, abs=0.02)  # uint8 pictures are scaled in whole levels


def test_more_pictures_than_a_chunk_keep_their_order(
    digits_engine: Engine, held_back: tuple[list[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = held_back[0][:11]
    whole = digits_engine.classify(pictures, top=1)
    monkeypatch.setattr(classify, "CHUNK", 4)
    assert [found[0].index for found in digits_engine.classify(pictures, top=1)] == [each[0].index for each in whole]


def test_colour_pictures_become_grey(digits_engine: Engine, held_back: tuple[list[np.ndarray], np.ndarray]) -> None:
    grey = held_back[0][0]
    colour = np.repeat(grey[..., None], 3, axis=-1)
    assert digits_engine.classify([colour], top=1) == digits_engine.classify([grey], top=1)


@pytest.fixture
def photograph() -> Preprocessing:
    return Preprocessing(224, channels=3, crop_padding=32, mean=127.0, scale=128.0)


def test_centre_crop_and_normalisation(photograph: Preprocessing) -> None:
    picture = np.zeros((512, 768, 3), np.uint8)
    picture[32:480, 160:608] = (255, 127, 0)  # the centre square of 448 = 512 × 224 / 256
    (batch,) = photograph([picture])
    assert batch.shape == (224, 224, 3)
    assert batch.dtype == np.float32
    np.testing.assert_array_equal(batch, np.broadcast_to([1.0, 0.0, -127 / 128], batch.shape).astype(np.float32))


def test_orientation_of_photographs(photograph: Preprocessing, tmp_path: Path) -> None:
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 256, 3), np.uint8))
    turned = upright.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise by 90°"
    turned.save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(photograph([tmp_path / "turned.png"]), photograph([upright]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_pixel_modes(mode: str, photograph: Preprocessing) -> None:
    image = Image.new("RGB", (40, 30), (255, 255, 255)).convert(mode)
    np.testing.assert_allclose(photograph([image]), 1.0, atol=0.02)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A folder of pictures that cannot be read."""
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:900])
    (tmp_path / "text.jpg").write_text("not a picture")
    (tmp_path / "folder.jpg").mkdir()
    Image.new("1", (14_000, 14_000)).save(tmp_path / "bomb.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("I;16", (4, 4)).save(tmp_path / "deep.png")
    (tmp_path / "drawing.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jpg", "there is no such file"),
        ("cut.jpg", "the picture is damaged or incomplete"),
        ("text.jpg", "not a picture in one of the formats BMP, GIF, JPEG"),
        ("drawing.eps", "not a picture in one of the formats BMP, GIF, JPEG"),
        ("folder.jpg", "cannot be read"),
        ("bomb.png", "196000000 pixels.*raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"),
        ("large.png", "100000000 pixels.*raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"),
        ("deep.png", "16 or 32 bits"),
    ],
)
def test_bad_files_are_named(name: str, message: str, files: Path, digits_engine: Engine) -> None:
    with pytest.raises(BatchError, match=f"{re.escape(str(files / name))}: .*{message}"):
        digits_engine.classify([np.zeros((8, 8), np.uint8), files / name])
    digits_engine.classify([np.zeros((8, 8), np.uint8)])  # still usable


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_large_file_is_refused_where_pillow_only_warns(files: Path, digits_engine: Engine) -> None:
    with pytest.raises(BatchError, match=r"large.png: 10000×10000 pixels exceed the limit of \d+"):
        digits_engine.classify([files / "large.png"])


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        ([], {}, BatchError, "classify got no pictures"),
        ("cat.jpg", {}, BatchError, r"a list of pictures, but got one str: write \[picture\]"),
        (np.zeros((8, 8), np.uint8), {}, BatchError, r"one array uint8\[8, 8\]: write \[picture\]"),
        ([3], {}, BatchError, "picture 0 is a int; expected a path, a Pillow image or an array"),
        ([np.zeros((8, 8, 4), np.uint8)], {}, BatchError, r"picture 0 is an array uint8\[8, 8, 4\]; expected uint8"),
        ([np.zeros((0, 8), np.uint8)], {}, BatchError, r"picture 0 is an array uint8\[0, 8\]"),
        ([np.zeros((8, 8), np.int64)], {}, BatchError, r"int64\[8, 8\]; expected uint8 .* or floating point"),
        ([np.full((8, 8), 16.0)], {}, BatchError, "floating-point pixels from 16 to 16; expected 0 to 1"),
        ([np.full((8, 8), np.nan)], {}, BatchError, "floating-point pixels from nan to nan"),
        ([np.zeros((8, 8), np.uint8)], {"top": 0}, TaskError, "top=0: the model has 10 classes; ask for 1 to 10"),
        ([np.zeros((8, 8), np.uint8)], {"top": 11}, TaskError, "top=11: the model has 10 classes"),
    ],
)
def test_bad_input_says_what_was_expected(
    images: Any, options: dict[str, Any], error: type[Exception], message: str, digits_engine: Engine
) -> None:
    with pytest.raises(error, match=message):
        digits_engine.classify(images, **options)


def test_names_of_classes() -> None:
    names = imagenet_names()
    assert len(names) == 1000
    assert (names[0], names[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
    assert class_names(1000, {}) == names
    assert class_names(10, {}) is None
    assert class_names(3, {"id2label": {"0": "cat", "2": "dog"}}) == ("cat", "1", "dog")


@pytest.mark.slow
def test_the_example_trains_a_model_that_the_engine_reads(tmp_path: Path) -> None:
    from examples.train_digits import main

    assert main(tmp_path / "digits") >= 0.97
