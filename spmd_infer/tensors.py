"""What is known of a tensor before it exists: shape, dtype, logical axes, and where a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Axes = tuple[str | None, ...]
"""One logical axis name (or None) for each dimension of a tensor."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a model, with the dimensions that may vary given by name.

    Attributes:
        shape: sizes; a string names a dimension that varies from call to call. ``"batch"`` marks the batch dimension,
            which the engine pads to a bucket; any other name (``"seq"``) may take any size, one program for each.
        dtype: the dtype that the model expects.
        axes: logical axes, one for each dimension. Defaults to the dimension names, None for fixed sizes.
        required: whether every batch must have it; only entries of a dict can be left out.
    """

    shape: tuple[int | str, ...]
    dtype: npt.DTypeLike
    axes: Axes = ()
    required: bool = True

    def __post_init__(self) -> None:
        if not self.axes:
            object.__setattr__(self, "axes", tuple(d if isinstance(d, str) else None for d in self.shape))
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    def __str__(self) -> str:
        return f"{np.dtype(self.dtype).name}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Source:
    """Where a checkpoint keeps one weight, and how it becomes the model's.

    Attributes:
        name: the tensor's name in the checkpoint.
        transpose: permutation from the stored dimensions to the model's, as in ``np.transpose(stored, transpose)``.
            Slices are still read one by one.
        transform: applied to the *whole* stored tensor (after ``transpose``) where a permutation of dimensions is not
            enough; the loader then reads the whole tensor once.
    """

    name: str
    transpose: tuple[int, ...] | None = None
    transform: Callable[[npt.NDArray[Any]], npt.NDArray[Any]] | None = None
