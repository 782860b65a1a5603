"""Quantised tensors as they are stored: small numbers with scales, for layers that multiply by them as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

GROUP = 32
"""How many neighbours share a scale in the GGUF types that are kept."""

KINDS = {
    GGMLQuantizationType.Q8_0: "int8",
    GGMLQuantizationType.Q4_0: "int4",
    GGMLQuantizationType.Q4_1: "uint4",
}
"""GGUF types whose blocks are a scale, perhaps an offset, and 32 integers; others have scales of scales."""


@dataclass(frozen=True)
class QuantisedSlice:
    """A slice of a quantised tensor; it stands for ``values * scales + offsets``, each group with its own.

    Attributes:
        kind: ``int8``, ``int4`` with values from -8 to 7, or ``uint4`` with values from 0 to 15 and offsets.
        values: int8 ``[..., width]``.
        scales: float32 ``[..., width / group]``.
        offsets: float32 ``[..., width / group]``; None where there are none.
        group: how many neighbours along the last dimension share a scale.
    """

    kind: str
    values: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32] | None
    group: int = GROUP

    def floats(self) -> npt.NDArray[np.float32]:
        """What it stands for, ``[..., width]``."""
        grouped = self.values.reshape(*self.scales.shape, self.group).astype(np.float32) * self.scales[..., None]
        if self.offsets is not None:
            grouped += self.offsets[..., None]
        return grouped.reshape(self.values.shape)

    def packed(self) -> npt.NDArray[np.uint8]:
        """The values of four bits two to a byte, ``[..., width / 2]``, as the native store packs them.

        Those of ``int4`` have 8 added; the first of two neighbours is the low half.
        """
        shifted = (self.values + np.int8(8 if self.kind == "int4" else 0)).view(np.uint8)
        return shifted[..., 0::2] | np.left_shift(shifted[..., 1::2], np.uint8(4))


def unpack(kind: GGMLQuantizationType, blocks: npt.NDArray[np.uint8]) -> QuantisedSlice:
    """Blocks ``[..., groups, bytes]`` of one of ``KINDS`` as numbers and scales; nothing is rounded."""
    shape = (*blocks.shape[:-2], blocks.shape[-2] * GROUP)
    scales = _halves(blocks, 0)
    if kind == GGMLQuantizationType.Q8_0:
        values = np.ascontiguousarray(blocks[..., 2:]).view(np.int8)
        return QuantisedSlice("int8", values.reshape(shape), scales, None)
    offset = kind == GGMLQuantizationType.Q4_1
    nibbles = blocks[..., 4 if offset else 2 :]  # element i of a group is the low half of byte i, 16 + i the high one
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).view(np.int8).reshape(shape)
    if offset:
        return QuantisedSlice("uint4", values, scales, _halves(blocks, 2))
    return QuantisedSlice("int4", values - np.int8(8), scales, None)


def _halves(blocks: npt.NDArray[np.uint8], at: int) -> npt.NDArray[Any]:
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0].astype(np.float32)
