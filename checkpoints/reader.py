"""What every checkpoint reader offers, whatever the format of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.errors import CheckpointError

Index = tuple[slice, ...]
"""One contiguous slice for each leading dimension; dimensions left out are taken whole."""

_MOST_DIMENSIONS = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, as its header describes it; nothing of its data has been read.

    Attributes:
        name: its name in the checkpoint.
        shape: its shape, outermost dimension first.
        dtype: the dtype that ``Reader.read`` returns.
        nbytes: the bytes that it takes in its file.
        file: the file that holds it.
        stored_as: how the file stores it, in the format's own words (``"BF16"``, ``"Q4_1"``, ``"FloatStorage"``).
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    nbytes: int
    file: Path
    stored_as: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """The number of elements."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    def __str__(self) -> str:
        stored = f" stored as {self.stored_as}" if self.stored_as else ""
        return f"{self.name!r} {self.dtype.name}[{', '.join(map(str, self.shape))}]{stored} in {self.file}"


@runtime_checkable
class Reader(Protocol):
    """An open checkpoint: its tensors are listed without being read, and read slice by slice.

    A reader may also have ``read_into(name, box, out)``, which spares a copy: it reads a box (start and stop in each
    dimension) into C-ordered memory of the box's shape and the tensor's dtype; and ``takes_whole(name)``, which says
    whether reading any part of a tensor costs as much as reading all of it, so that it should be read once. It may
    have ``stream(name, box, scratch)``, the bytes of a box block by block, each in the same memory, or None where the
    format does not keep them together; and ``read_quantised(name, index)``, quantised tensors as they are stored.
    """

    @property
    def path(self) -> Path:
        """What was opened."""
        ...

    @property
    def stored(self) -> str:
        """The format: ``"safetensors"``, ``"gguf"``, ``"pth"``, or a third party's name."""
        ...

    @property
    def folder(self) -> Path:
        """The folder in which files that belong to the checkpoint (a tokenizer) lie."""
        ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by name."""
        ...

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration in the terms of a Hugging Face ``config.json``; empty where there is none."""
        ...

    @property
    def architecture(self) -> str | None:
        """What the checkpoint says the model is; None where it does not say."""
        ...

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Fields of the file's header beyond the tensors, under the format's own names."""
        ...

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor.

        Args:
            name: the tensor.
            index: contiguous slices (step 1) of its leading dimensions; None for the whole tensor.

        Raises:
            CheckpointError: there is no such tensor, the index does not suit it, or its bytes cannot be read.
        """
        ...


def read_into(reader: Reader, name: str, box: Box, out: npt.NDArray[Any]) -> None:
    """Read a box of a tensor into C-ordered memory, without a copy where the reader can."""
    direct: Callable[[str, Box, npt.NDArray[Any]], None] | None = getattr(reader, "read_into", None)
    if direct is not None:
        direct(name, box, out)
    else:
        np.copyto(out, reader.read(name, as_slices(box)))


def stream(reader: Reader, name: str, box: Box, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]] | None:
    """The bytes of a box block by block; None where the reader cannot give them so."""
    streams: Callable[[str, Box, Scratch], Iterator[npt.NDArray[np.uint8]] | None] | None
    streams = getattr(reader, "stream", None)
    return streams(name, box, scratch) if streams is not None else None


def takes_whole(reader: Reader, name: str) -> bool:
    """Whether a tensor should be read all at once, and not slice by slice."""
    says: Callable[[str], bool] | None = getattr(reader, "takes_whole", None)
    return says is not None and says(name)


def find_tensor(tensors: Mapping[str, TensorInfo], name: str, path: Path) -> TensorInfo:
    """The entry of one tensor; raises CheckpointError with the nearest names where there is none."""
    info = tensors.get(name)
    if info is None:
        import difflib

        near = difflib.get_close_matches(name, tensors, n=3)
        hint = f"; nearest names: {', '.join(near)}" if near else ""
        raise CheckpointError(f"{path}: no tensor {name!r} among its {len(tensors)} tensors{hint}")
    return info


def bounds(index: Index | None, info: TensorInfo) -> tuple[tuple[int, int], ...]:
    """Start and stop of each dimension of a tensor under an index of slices.

    Raises:
        CheckpointError: more slices than dimensions, a step other than 1, or something that is not a slice.
    """
    given = () if index is None else index
    if len(given) > len(info.shape):
        raise CheckpointError(f"{info}: an index of {len(given)} slices was given for {len(info.shape)} dimensions")
    result = []
    for position, size in enumerate(info.shape):
        piece = given[position] if position < len(given) else slice(None)
        if not isinstance(piece, slice) or piece.step not in (None, 1):
            raise CheckpointError(f"{info}: index {piece!r} of dimension {position}; expected a slice with step 1")
        start, stop, _ = piece.indices(size)
        result.append((start, max(start, stop)))
    return tuple(result)


def check_shape(shape: Sequence[int], dtype: np.dtype[Any], name: str, file: Path) -> None:
    """Refuse shapes that no array can have: too many dimensions, or sizes that overflow (even beside a zero)."""
    count = 1
    for dim in shape:
        count *= max(1, dim)
    if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0 or count * dtype.itemsize >= 1 << 63:
        raise CheckpointError(
            f"{file}: tensor {name!r} has shape {str(list(shape))[:120]}, which no array of {dtype.name} can have"
        )
