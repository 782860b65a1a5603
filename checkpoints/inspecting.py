"""What is in a checkpoint, told from its headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from spmd_infer.checkpoints.boxes import box_shape, elements
from spmd_infer.checkpoints.reader import Reader, TensorInfo
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    from spmd_infer.checkpoints.mesh_boxes import MeshLayout  # imports JAX


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        info: what the header says of it.
        axes: its logical axes; None where they are unknown.
        split: into how many pieces the mesh cuts it; 1 where it stays whole or no mesh was given.
        piece: the shape of a piece.
    """

    info: TensorInfo
    axes: Axes | None
    split: int
    piece: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """A part of the tree of names: a tensor, or all that share the beginning of a name.

    Attributes:
        name: the part of the name.
        nbytes: bytes of all tensors below.
        tensors: how many there are.
        parts: what is below.
    """

    name: str
    nbytes: int
    tensors: int
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Overview:
    """A checkpoint as ``inspect`` shows it.

    Attributes:
        path: where it is.
        stored: its format.
        architecture: what it says that it is.
        rows: its tensors.
        tree: the same as a tree of names.
        host_bytes: for a mesh, the bytes that each host holds.
        device_bytes: for a mesh, the bytes that the fullest device holds.
    """

    path: str
    stored: str
    architecture: str | None
    rows: tuple[Row, ...]
    tree: Node
    host_bytes: tuple[int, ...]
    device_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(row.info.nbytes for row in self.rows)

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(row.info.size for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "path": self.path,
            "format": self.stored,
            "architecture": self.architecture,
            "bytes": self.nbytes,
            "parameters": self.parameters,
            "dtypes": dtype_bytes(self.rows),
            "host_bytes": list(self.host_bytes),
            "device_bytes": self.device_bytes,
            "tensors": [
                {
                    "name": row.info.name,
                    "shape": list(row.info.shape),
                    "dtype": row.info.dtype.name,
                    "stored_as": row.info.stored_as,
                    "bytes": row.info.nbytes,
                    "file": row.info.file.name,
                    "axes": list(row.axes) if row.axes is not None else None,
                    "split": row.split,
                    "piece": list(row.piece),
                }
                for row in self.rows
            ],
        }


def inspect(reader: Reader, axes: Mapping[str, Axes] | None = None, layout: MeshLayout | None = None) -> Overview:
    """Look at a checkpoint; nothing but headers is read, so that it may be larger than memory.

    Args:
        reader: the open checkpoint.
        axes: logical axes of the tensors that have any.
        layout: show how it lies on this mesh.
    """
    rows: list[Row] = []
    hosts = [0] * (layout.hosts if layout else 0)
    device = 0
    for info in reader.tensors.values():
        named = (axes or {}).get(info.name)
        split, piece = 1, info.shape
        if layout is not None:
            itemsize = info.dtype.itemsize
            holders = layout.holders(info.name, info.shape, itemsize, named)
            split, piece = len(holders), box_shape(next(iter(holders), ()))
            for box, where in holders.items():
                for host in where:
                    hosts[host] += elements(box) * itemsize
            device += prod(piece) * itemsize
        rows.append(Row(info, named, split, piece))
    tree = _tree(reader.path.name, [(row.info.name.split("."), row.info.nbytes) for row in rows])
    return Overview(str(reader.path), reader.stored, reader.architecture, tuple(rows), tree, tuple(hosts), device)


def dtype_bytes(rows: tuple[Row, ...]) -> dict[str, int]:
    """Bytes by how they are stored, most first."""
    result: dict[str, int] = {}
    for row in rows:
        name = row.info.stored_as or row.info.dtype.name
        result[name] = result.get(name, 0) + row.info.nbytes
    return dict(sorted(result.items(), key=lambda item: -item[1]))


def lines_of(tree: Node, depth: int, indent: int = 0) -> Iterator[tuple[int, Node]]:
    """The tree's nodes down to a depth, each with how far it is indented; chains of single parts count as one."""
    for part in tree.parts:
        node = part
        while len(node.parts) == 1:
            only = node.parts[0]
            node = Node(f"{node.name}.{only.name}", only.nbytes, only.tensors, only.parts)
        yield indent, node
        if depth > 1:
            yield from lines_of(node, depth - 1, indent + 1)


def _tree(name: str, leaves: list[tuple[list[str], int]]) -> Node:
    groups: dict[str, list[tuple[list[str], int]]] = {}
    for words, nbytes in leaves:
        if words:
            groups.setdefault(words[0], []).append((words[1:], nbytes))
    parts = tuple(_tree(word, inner) for word, inner in groups.items())
    return Node(name, sum(nbytes for _, nbytes in leaves), len(leaves), parts)
