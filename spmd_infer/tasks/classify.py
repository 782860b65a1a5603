"""Name what is on pictures: ``engine.classify(images)``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from spmd_infer.errors import BatchError, TaskError
from spmd_infer.tasks.images import Picture, Preprocessing

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

CHUNK = 64  # pictures decoded ahead of the devices: 38 MB of float32 at 224×224


@dataclass(frozen=True, slots=True)
class Label:
    """One class that a picture may show.

    Attributes:
        index: the class's number.
        name: its name, where the model's classes have names.
        score: its probability (softmax over all classes).
    """

    index: int
    name: str | None
    score: float


class Classify:
    """Classifies pictures with one engine.

    Args:
        engine: an engine whose model takes one ``image`` and returns logits ``[B, classes]``.

    Raises:
        TaskError: the engine's model is not an image classifier.
    """

    def __init__(self, engine: Engine) -> None:
        family = engine.family
        if family is None or family.task != "classify" or family.name not in _PREPROCESSING:
            said = "a model of your own" if family is None else f"family {family.name!r}"
            raise TaskError(
                f"classify takes an image classifier of the zoo ({', '.join(_PREPROCESSING)}), but the engine holds "
                f"{said}; use engine.infer with preprocessed tensors"
            )
        config: Any = engine.config
        self._engine = engine
        self._preprocess = _PREPROCESSING[family.name](config)
        self._num_classes: int = config.num_classes
        self.names = class_names(self._num_classes, engine.reader.config if engine.reader else {})

    def __call__(self, images: Sequence[Picture] | npt.NDArray[Any], top: int = 5) -> list[list[Label]]:
        """The most probable classes of each picture.

        Args:
            images: a list of paths, Pillow images or arrays of pixels, or one array of several pictures.
            top: how many classes to name.

        Returns:
            For each picture, in order, ``top`` labels, the most probable first.

        Raises:
            TaskError: ``top`` is not from 1 to the number of classes.
            BatchError: there are no pictures, or one cannot be read; names it.
        """
        if not 1 <= top <= self._num_classes:
            raise TaskError(f"top={top}: the model has {self._num_classes} classes; ask for 1 to {self._num_classes}")
        if isinstance(images, (str, os.PathLike, Image.Image)):
            raise BatchError(f"classify takes a list of pictures, but got one {type(images).__name__}: write [picture]")
        if isinstance(images, np.ndarray) and images.ndim < (3 if self._preprocess.channels == 1 else 4):
            raise BatchError(
                f"classify takes a list of pictures, but got one array {images.dtype.name}{list(images.shape)}: write "
                "[picture], or stack several along a first dimension"
            )
        pictures = list(images)
        if not pictures:
            raise BatchError("classify got no pictures; give at least one")
        labels: list[list[Label]] = []
        for logits in self._engine.infer_stream(self._batches(pictures)):
            labels += [self._label(row, top) for row in _softmax(np.asarray(logits, np.float32))]
        return labels

    def _batches(self, pictures: list[Picture]) -> Iterator[dict[str, npt.NDArray[np.float32]]]:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decode") as pool:
            for start in range(0, len(pictures), CHUNK):
                yield {"image": self._preprocess(pictures[start : start + CHUNK], pool)}

    def _label(self, scores: npt.NDArray[np.float32], top: int) -> list[Label]:
        best = np.argsort(-scores, kind="stable")[:top]
        return [Label(int(i), self.names[i] if self.names else None, float(scores[i])) for i in best]


def class_names(num_classes: int, config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Names of a model's classes: from ``id2label`` of its configuration, or ImageNet's where it has 1,000 classes."""
    named = config.get("id2label")
    if named:
        return tuple(str(named.get(str(i), named.get(i, i))) for i in range(num_classes))
    return imagenet_names() if num_classes == 1000 else None


def imagenet_names() -> tuple[str, ...]:
    """The 1,000 classes of ImageNet (ILSVRC 2012), in the order of their sorted synsets."""
    text = (resources.files("spmd_infer.models") / "imagenet-1k.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Over the last dimension, on the host: 0.3 ms for 64 rows of 1,000, and no collective over split classes."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    result: npt.NDArray[np.float32] = weights / weights.sum(axis=-1, keepdims=True)
    return result


def _photograph(config: Any) -> Preprocessing:
    """As EfficientNet-Lite was trained: centre crop, bicubic, ``(pixel - 127) / 128``."""
    return Preprocessing(config.image_size, channels=3, crop_padding=32, mean=127.0, scale=128.0)


def digits_preprocessing(config: Any) -> Preprocessing:
    """The whole picture in grey, pixels from 0 to 1."""
    return Preprocessing(config.image_size, channels=config.num_channels, resample=Image.Resampling.BILINEAR)


_PREPROCESSING = {"cnn": digits_preprocessing, "efficientnet-lite": _photograph}
