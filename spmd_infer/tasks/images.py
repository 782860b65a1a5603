"""Pictures to tensors: decode, crop, scale and normalise, on a few threads.

Decoding is bounded: a picture of more pixels than Pillow's ``Image.MAX_IMAGE_PIXELS`` is refused after its header is
read, and only plain raster formats are tried (Pillow would run Ghostscript for EPS).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from spmd_infer.errors import BatchError

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any]"
"""A path, a Pillow image, or an array of pixels."""

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


@dataclass(frozen=True)
class Preprocessing:
    """How a model wants its pictures.

    Attributes:
        size: rows and columns.
        channels: 3 for RGB, 1 for grey.
        crop_padding: the centre square taken is ``size / (size + crop_padding)`` of the shorter side; None takes the
            whole picture, whatever its proportions.
        resample: Pillow's filter.
        mean: subtracted from the pixels (0 to 255).
        scale: divides them afterwards.
    """

    size: int
    channels: int
    crop_padding: int | None = None
    resample: Image.Resampling = Image.Resampling.BICUBIC
    mean: float = 0.0
    scale: float = 255.0

    def __call__(self, pictures: Sequence[Picture], pool: ThreadPoolExecutor | None = None) -> npt.NDArray[np.float32]:
        """Preprocess pictures.

        Args:
            pictures: paths, Pillow images, ``uint8`` arrays ``[height, width, 3]`` or ``[height, width]``, or, for a
                grey model, floating-point arrays ``[height, width]`` from 0 to 1.
            pool: threads to decode on.

        Returns:
            ``float32 [N, size, size, channels]``.

        Raises:
            BatchError: a picture that cannot be read, is too large, or has the wrong shape or dtype; names it.
        """
        batch = np.empty((len(pictures), self.size, self.size, self.channels), np.float32)

        def fill(position: int) -> None:
            batch[position] = self._one(pictures[position], position)

        if pool is None:
            for position in range(len(pictures)):
                fill(position)
        else:
            list(pool.map(fill, range(len(pictures))))
        return batch

    def _one(self, picture: object, position: int) -> npt.NDArray[np.float32]:
        name = f"picture {position}"
        if isinstance(picture, (str, os.PathLike)):
            with _open(Path(picture)) as image:
                pixels = self._pixels(image, str(picture))
        elif isinstance(picture, Image.Image):
            pixels = self._pixels(picture, name)
        elif isinstance(picture, np.ndarray):
            pixels = self._pixels(self._from_array(picture, name), name)
        else:
            kind = type(picture).__name__
            raise BatchError(f"{name} is a {kind}; expected a path, a Pillow image or an array of pixels")
        return ((pixels - self.mean) / self.scale).reshape(self.size, self.size, self.channels)

    def _pixels(self, image: Image.Image, name: str) -> npt.NDArray[np.float32]:
        """The picture turned upright, cropped and scaled, its pixels from 0 to 255."""
        if not (image.width and image.height):
            raise BatchError(f"{name}: a picture of {image.width}×{image.height} pixels is empty")
        if image.mode.startswith("I"):
            raise BatchError(
                f"{name}: its pixels have 16 or 32 bits (mode {image.mode!r}); convert them to 8 bits a channel"
            )
        try:
            image.load()
            image = ImageOps.exif_transpose(image)
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow's decoders raise
            raise BatchError(f"{name}: the picture is damaged or incomplete: {error}") from error
        if image.mode != "F":  # F: grey in floating point, from an array
            image = image.convert("RGBA") if image.mode in ("P", "PA") else image
            image = image.convert("RGB" if self.channels == 3 else "L")
        if self.crop_padding is not None:
            side = int(min(image.size) * self.size / (self.size + self.crop_padding)) or 1
            left, top = (image.width - side + 1) // 2, (image.height - side + 1) // 2
            image = image.crop((left, top, left + side, top + side))
        return np.asarray(image.resize((self.size, self.size), self.resample), np.float32)

    def _from_array(self, array: npt.NDArray[Any], name: str) -> Image.Image:
        pixels = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
        colour = pixels.ndim == 3 and pixels.shape[-1] == 3
        if pixels.size and pixels.dtype == np.uint8 and (colour or pixels.ndim == 2):
            return Image.fromarray(np.ascontiguousarray(pixels))
        if pixels.size and self.channels == 1 and pixels.ndim == 2 and np.issubdtype(pixels.dtype, np.floating):
            low, high = float(pixels.min()), float(pixels.max())
            if not (low >= 0.0 and high <= 1.0):
                raise BatchError(
                    f"{name} has floating-point pixels from {low:g} to {high:g}; expected 0 to 1 (or uint8)"
                )
            return Image.fromarray(pixels.astype(np.float32) * 255.0)
        wanted = "uint8 [height, width, 3] or [height, width]"
        if self.channels == 1:
            wanted += ", or floating point [height, width] from 0 to 1"
        raise BatchError(
            f"{name} is an array {array.dtype.name}{list(array.shape)}; expected {wanted} "
            "(tensors that are preprocessed already go to engine.infer)"
        )


def _open(path: Path) -> Image.Image:
    """Read a picture's header, and refuse what is too large to decode."""
    try:
        image = Image.open(path, formats=FORMATS)
    except FileNotFoundError:
        raise BatchError(f"{path}: there is no such file") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BatchError(f"{path}: {error}; raise PIL.Image.MAX_IMAGE_PIXELS if you trust it") from None
    except UnidentifiedImageError:
        raise BatchError(f"{path}: not a picture in one of the formats {', '.join(FORMATS)}") from None
    except OSError as error:
        raise BatchError(f"{path}: cannot be read: {error.strerror or error}") from error
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        image.close()
        raise BatchError(
            f"{path}: {image.width}×{image.height} pixels exceed the limit of {limit}; raise "
            "PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        )
    return image
