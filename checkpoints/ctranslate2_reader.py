"""CTranslate2 models (``model.bin``): a list of named arrays, and names that stand for others of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.file_bytes import FileBytes
from spmd_infer.checkpoints.folder_files import read_config
from spmd_infer.checkpoints.reader import Index, TensorInfo, bounds, check_shape, find_tensor
from spmd_infer.errors import CheckpointError

NAME = "model.bin"
_VERSIONS = (4, 5, 6)
_MOST_NAME = 4096
_MOST_VARIABLES = 1 << 20
_LEAST_VARIABLE = 10  # bytes of the shortest entry
_DTYPES: tuple[npt.DTypeLike, ...] = (np.float32, np.int8, np.int16, np.int32, np.float16, ml_dtypes.bfloat16)


class CTranslate2Reader:
    """Reader of one ``model.bin``.

    ``metadata`` holds ``version``, ``revision`` and ``aliases``: names that stand for another tensor, listed as tensors
    too.
    """

    stored = "ctranslate2"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent
        self._bytes = FileBytes(path)
        self._at = 0
        self._offsets: dict[str, int] = {}
        self.tensors: dict[str, TensorInfo] = {}
        version = self._number(4)
        if version not in _VERSIONS:
            raise CheckpointError(f"{path}: is of version {version}; known are {', '.join(map(str, _VERSIONS))}")
        self.architecture: str | None = self._text()
        revision = self._number(4)
        count = self._number(4)
        if count > min(_MOST_VARIABLES, self._bytes.size // _LEAST_VARIABLE):
            raise CheckpointError(f"{path}: claims {count} variables in {self._bytes.size} bytes")
        for _ in range(count):
            self._variable()
        aliases: dict[str, str] = {}
        claimed = self._number(4) if self._at < self._bytes.size else 0
        if claimed > min(_MOST_VARIABLES, self._bytes.size):
            raise CheckpointError(f"{path}: claims {claimed} aliases in {self._bytes.size} bytes")
        for _ in range(claimed):
            alias, name = self._text(), self._text()
            info = find_tensor(self.tensors, name, path)
            if alias in self.tensors:
                raise CheckpointError(f"{path}: alias {alias!r} is the name of another tensor")
            aliases[alias] = name
            self._offsets[alias] = self._offsets[name]
            self.tensors[alias] = TensorInfo(alias, info.shape, info.dtype, info.nbytes, path, info.stored_as)
        if self._at != self._bytes.size:
            raise CheckpointError(f"{path}: has {self._bytes.size - self._at} bytes behind its end")
        self.metadata: dict[str, Any] = {"version": version, "revision": revision, "aliases": aliases}
        self.config: dict[str, Any] = read_config(self.folder)

    def read(self, name: str, index: Index | None = None) -> npt.NDArray[Any]:
        """One slice of a tensor, in memory of its own; see ``Reader.read``."""
        info = find_tensor(self.tensors, name, self.path)
        return self._bytes.read(self._offsets[name], info.shape, info.dtype, bounds(index, info))

    def _variable(self) -> None:
        name = self._text()
        rank = self._number(1)
        shape = tuple(self._number(4) for _ in range(rank))
        kind, nbytes = self._number(1), self._number(4)
        if name in self.tensors or kind >= len(_DTYPES):
            raise CheckpointError(f"{self.path}: variable {name!r} occurs twice, or is of unknown type {kind}")
        dtype: np.dtype[Any] = np.dtype(_DTYPES[kind])
        check_shape(shape, dtype, name, self.path)
        if nbytes != math.prod(shape) * dtype.itemsize or self._at + nbytes > self._bytes.size:
            raise CheckpointError(
                f"{self.path}: variable {name!r}, {dtype.name}{list(shape)}, claims {nbytes} bytes at {self._at} of "
                f"{self._bytes.size}"
            )
        self._offsets[name] = self._at
        self.tensors[name] = TensorInfo(name, shape, dtype, nbytes, self.path, dtype.name)
        self._at += nbytes

    def _text(self) -> str:
        size = self._number(2)
        raw = self._bytes.head(size, self._at)
        if not 0 < size <= _MOST_NAME or len(raw) < size or raw[-1] != 0:
            raise CheckpointError(f"{self.path}: expected a name at byte {self._at}, found {raw[:16]!r}")
        self._at += size
        try:
            return raw[:-1].decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: name {raw[:40]!r} is not UTF-8") from error

    def _number(self, size: int) -> int:
        raw = self._bytes.head(size, self._at)
        if len(raw) < size:
            raise CheckpointError(f"{self.path}: ends at byte {self._bytes.size}, in the middle of its header")
        self._at += size
        return int.from_bytes(raw, "little")


def is_ctranslate2(path: Path, head: bytes) -> bool:
    """Whether a file is CTranslate2's, by its name and first bytes: a version, then the name of a specification."""
    if not path.is_file() or path.name != NAME or len(head) < 8:
        return False
    length = int.from_bytes(head[4:6], "little")
    return (
        int.from_bytes(head[:4], "little") < 64 and 4 < length < 58 and head[6 + length - 5 : 6 + length] == b"Spec\0"
    )
