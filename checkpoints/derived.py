"""A checkpoint seen through a change: other names, other dimensions, tensors joined, split or computed.

A change is a reader made from a reader, so that changes can be stacked and whatever reads checkpoints can read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import Box, as_slices
from spmd_infer.checkpoints.file_bytes import Scratch
from spmd_infer.checkpoints.manifest import Chunk
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.reader import Index, Reader, TensorInfo, bounds, find_tensor, read_into, stream, takes_whole
from spmd_infer.errors import CheckpointError
from spmd_infer.tensors import Axes, Source

Array = npt.NDArray[Any]

UNUSED = "unused/"
"""What the names of tensors begin with that belong to a checkpoint but not to its model as it is here."""


@dataclass(frozen=True)
class Derived:
    """One tensor of a derived reader.

    Attributes:
        info: how it looks from outside.
        read: its values in a box.
        takes_whole: whether reading any part of it takes the whole of what it is made from.
        origin: the tensor underneath that has the same bytes; None where none does.
    """

    info: TensorInfo
    read: Callable[[Box], Array]
    takes_whole: bool = False
    origin: str | None = None


class DerivedReader:
    """A reader whose tensors are made from another one's.

    Args:
        base: the checkpoint underneath; everything but the tensors is its own.
        tensors: the tensors, in the order in which they should be read.
        config: the configuration, where it changes with them.
        architecture: the architecture, where it changes.
    """

    def __init__(
        self,
        base: Reader,
        tensors: Mapping[str, Derived],
        *,
        config: Mapping[str, Any] | None = None,
        architecture: str | None = None,
    ) -> None:
        self.base = base
        self.derived = dict(tensors)
        self.tensors: dict[str, TensorInfo] = {name: tensor.info for name, tensor in tensors.items()}
        self.config: Mapping[str, Any] = base.config if config is None else config
        self.architecture = architecture or base.architecture

    @property
    def path(self) -> Path:
        """What was opened."""
        return self.base.path

    @property
    def stored(self) -> str:
        """The format underneath."""
        return self.base.stored

    @property
    def folder(self) -> Path:
        """The folder underneath."""
        return self.base.folder

    @property
    def metadata(self) -> Mapping[str, Any]:
        """The fields underneath."""
        return self.base.metadata

    def read(self, name: str, index: Index | None = None) -> Array:
        """One slice of a tensor; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        return self.derived[name].read(bounds(index, info))

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Read a box of a tensor into memory that is there; see ``Reader``."""
        tensor = self.derived[name]
        if tensor.origin is not None:
            read_into(self.base, tensor.origin, box, out)
        else:
            np.copyto(out, tensor.read(box))

    def stream(self, name: str, box: Box, scratch: Scratch) -> Iterator[npt.NDArray[np.uint8]] | None:
        """The bytes of a box block by block, where the tensor is not changed; see ``Reader``."""
        origin = self.derived[name].origin
        return stream(self.base, origin, box, scratch) if origin is not None else None

    def takes_whole(self, name: str) -> bool:
        """Whether a tensor should be read all at once; see ``Reader``."""
        return self.derived[name].takes_whole


def same(base: Reader, name: str, info: TensorInfo | None = None) -> Derived:
    """A tensor as it is underneath, under a name and description that may differ."""
    read: Callable[[Box], Array] = lambda box: base.read(name, as_slices(box))  # noqa: E731 - one expression
    return Derived(info or base.tensors[name], read, takes_whole(base, name), origin=name)


def from_source(base: Reader, path: str, source: Source, shape: tuple[int, ...]) -> Derived:
    """A model's parameter as its source says, in the model's layout.

    Raises:
        CheckpointError: the checkpoint does not hold it in that shape.
    """
    info = find_tensor(base.tensors, source.name, base.path)
    order = source.transpose
    stored = info.shape if order is None else tuple(info.shape[d] for d in order)
    if source.transform is None and stored != shape:
        raise CheckpointError(f"{base.path}: {path}: expected shape {list(shape)}, found {info}")
    result = TensorInfo(path, shape, info.dtype, info.nbytes, info.file, info.stored_as)
    transform = source.transform
    if transform is None:
        return Derived(
            result,
            lambda box: _turned(base, source.name, order, box),
            takes_whole(base, source.name),
            origin=source.name if order is None else None,
        )

    def read(box: Box) -> Array:
        tensor = base.read(source.name)
        made = transform(tensor if order is None else tensor.transpose(order))
        if made.shape != shape:
            raise CheckpointError(f"{base.path}: {path}: expected shape {list(shape)}, its transform made {made.shape}")
        return made[as_slices(box)]

    return Derived(result, read, takes_whole=True)


def by_parameter(base: Reader, table: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]]) -> DerivedReader:
    """A checkpoint under a model's parameter paths and in the model's layout, in the order of the file.

    Tensors that the model does not use are kept, their names behind ``UNUSED``.
    """
    order = {name: position for position, name in enumerate(base.tensors)}
    paths = sorted(shapes, key=lambda path: order.get(table[path].name, len(order)))
    tensors = {path: from_source(base, path, table[path], shapes[path]) for path in paths}
    used = {table[path].name for path in paths}
    for name, info in base.tensors.items():
        if name not in used:
            kept = name if name.startswith(UNUSED) else UNUSED + name
            tensors[kept] = same(base, name, replace(info, name=kept))
    return DerivedReader(base, tensors)


def by_stored_name(
    base: Reader,
    table: Mapping[str, Source],
    *,
    config: Mapping[str, Any],
    architecture: str | None = None,
    unused: bool = False,
) -> DerivedReader:
    """The way back: a checkpoint that holds parameter paths, under the names and in the layout of a stored format.

    Args:
        base: the checkpoint.
        table: where the format keeps each parameter.
        config: its configuration from now on.
        architecture: its architecture from now on.
        unused: give the tensors that the model does not use their names back; otherwise they are left out.

    Raises:
        CheckpointError: the format's table changes values in a way that has no way back.
    """
    tensors: dict[str, Derived] = {}
    for path, source in table.items():
        if source.transform is not None:
            raise CheckpointError(f"{path} cannot be written as {source.name!r}: its change has no way back")
        info = find_tensor(base.tensors, path, base.path)
        back = None if source.transpose is None else tuple(int(d) for d in np.argsort(source.transpose))
        shape = info.shape if back is None else tuple(info.shape[d] for d in back)
        result = TensorInfo(source.name, shape, info.dtype, info.nbytes, info.file, info.stored_as)
        tensors[source.name] = Derived(
            result,
            partial(_turned, base, path, back),
            takes_whole(base, path),
            origin=path if back is None else None,
        )
    for name, info in base.tensors.items():
        if unused and name.startswith(UNUSED):
            back_name = name.removeprefix(UNUSED)
            tensors[back_name] = same(base, name, replace(info, name=back_name))
    return DerivedReader(base, tensors, config=config, architecture=architecture)


def with_dtype(base: Reader, dtype: np.dtype[Any], axes: Mapping[str, Axes] | None = None) -> DerivedReader:
    """A checkpoint whose floats are said to have another dtype; whoever stores them casts and checks that they fit."""
    from spmd_infer.checkpoints.casting import cast, cast_problem

    def changed(name: str, info: TensorInfo) -> Derived:
        reason = cast_problem(info, dtype, base.tensors)
        if info.dtype == dtype or not _is_float(info.dtype):
            return same(base, name)
        if reason is not None:
            raise CheckpointError(f"{base.path}: {info}; {reason}")
        result = TensorInfo(name, info.shape, dtype, info.size * dtype.itemsize, info.file, info.stored_as)

        def read(box: Box) -> Array:
            values = base.read(name, as_slices(box))
            out = np.empty(values.shape, dtype)
            cast(values, out, name)
            return out

        return Derived(result, read, takes_whole(base, name))

    return DerivedReader(base, {name: changed(name, info) for name, info in base.tensors.items()})


def stored_chunks(reader: Reader, name: str) -> Mapping[Box, Chunk]:
    """The chunks of a native checkpoint whose bytes are a tensor's own; none where it is changed on the way."""
    while isinstance(reader, DerivedReader):
        origin = reader.derived[name].origin
        if origin is None:
            return {}
        reader, name = reader.base, origin
    return reader.stored_chunks(name) if isinstance(reader, NativeReader) else {}


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def _turned(base: Reader, name: str, order: tuple[int, ...] | None, box: Box) -> Array:
    """A box of a tensor whose dimensions are taken in another order."""
    if order is None:
        return base.read(name, as_slices(box))
    stored = [slice(None)] * len(order)
    for position, dimension in enumerate(order):
        stored[dimension] = slice(*box[position])
    return base.read(name, tuple(stored)).transpose(order)
