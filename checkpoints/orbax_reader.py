"""Trees that Orbax saved, of version 0 or 1: read through TensorStore, whose formats they are.

Orbax keeps no digests: a flipped bit in such a checkpoint is not noticed, unless it spoils the compression.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.boxes import as_slices
from spmd_infer.checkpoints.file_bytes import aligned_empty
from spmd_infer.checkpoints.folder_files import read_json
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, check_shape, find_tensor
from spmd_infer.errors import CheckpointError

TREE_NAME = "_METADATA"
_ITEMS = ("state", "default", "params", "model", "pytree")
_MOST_BYTES_AT_ONCE = 1 << 28


class OrbaxReader:
    """Reader of one saved tree; names are its keys joined by dots."""

    stored = "orbax"

    def __init__(self, path: Path) -> None:
        self.path = self.folder = path
        self._root = _tree_folder(path)
        document = read_json(self._root / TREE_NAME)
        tree = document.get("tree_metadata")
        if not isinstance(tree, dict) or not tree:
            raise CheckpointError(f"{self._root / TREE_NAME}: has no 'tree_metadata'")
        self._ocdbt = (self._root / "manifest.ocdbt").is_file()
        self._zarr3 = bool(document.get("use_zarr3"))
        self._context = _context()
        self.tensors: dict[str, TensorInfo] = {}
        self._stores: dict[str, Any] = {}
        for entry in tree.values():
            self._add(entry)
        if not self.tensors:
            raise CheckpointError(f"{path}: holds no arrays")
        self.config: dict[str, Any] = {}
        self.architecture: str | None = None
        self.metadata: dict[str, Any] = {}

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        wanted = bounds(index, info)
        out = aligned_empty([stop - start for start, stop in wanted], info.dtype)
        if out.size:
            try:
                np.copyto(out, self._stores[name][as_slices(wanted)].read().result())
            except (ValueError, OSError, RuntimeError) as error:
                raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        return out

    def takes_whole(self, name: str) -> bool:
        """Always: Orbax's own chunks are compressed and may be large; see ``Reader``."""
        return True

    def _add(self, entry: Any) -> None:
        import tensorstore

        keys, value = (
            entry.get(part) if isinstance(entry, dict) else None for part in ("key_metadata", "value_metadata")
        )
        if not isinstance(keys, list) or not isinstance(value, dict) or not all(isinstance(k, dict) for k in keys):
            raise CheckpointError(f"{self._root / TREE_NAME}: has an entry {entry!s:.120} without keys or value")
        kind = str(value.get("value_type"))
        if value.get("skip_deserialize") or kind not in ("jax.Array", "np.ndarray", "scalar"):
            return
        name = ".".join(str(key.get("key")) for key in keys)
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{self._root / TREE_NAME}: array name {name!r} is not a plain name")
        try:
            store = tensorstore.open(self._spec(name), open=True, read=True, context=self._context).result()
            dtype = np.dtype(store.dtype.numpy_dtype)
        except (ValueError, OSError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be opened: {error}") from error
        shape = tuple(int(size) for size in store.shape)
        check_shape(shape, dtype, name, self.path)
        self._stores[name] = store
        nbytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
        self.tensors[name] = TensorInfo(name, shape, dtype, nbytes, self._root, "zarr3" if self._zarr3 else "zarr")

    def _spec(self, name: str) -> Mapping[str, Any]:
        base = {"driver": "file", "path": str(self._root) + "/"}
        store = (
            {"driver": "ocdbt", "base": base, "path": name + "/"}
            if self._ocdbt
            else base | {"path": f"{self._root}/{name}/"}
        )
        return {"driver": "zarr3" if self._zarr3 else "zarr", "kvstore": store}


def is_orbax(path: Path) -> bool:
    """Whether a folder is one that Orbax saved a tree in."""
    return path.is_dir() and any((folder / TREE_NAME).is_file() for folder in (path, *(path / i for i in _ITEMS)))


def _tree_folder(path: Path) -> Path:
    found = [folder for folder in (path, *(path / item for item in _ITEMS)) if (folder / TREE_NAME).is_file()]
    if not found:
        raise CheckpointError(f"{path}: has no {TREE_NAME}")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise CheckpointError(f"{path}: holds {len(found)} trees ({names}); give the path of one")
    return found[0]


def _context() -> Any:
    """TensorStore with a bound on what it keeps; its threads are the process's."""
    import tensorstore

    return tensorstore.Context({"cache_pool": {"total_bytes_limit": _MOST_BYTES_AT_ONCE}})
