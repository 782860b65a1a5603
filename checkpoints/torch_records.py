"""What PyTorch's pickles may refer to, and the records that stand for it here; nothing of it is ever imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Name:
    """A global that the pickle refers to, from the allow-list."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Storage:
    """A run of elements that tensors are views of.

    Attributes:
        key: which of the file's storages.
        dtype: the elements' dtype; None where each tensor says it (untyped storages count in bytes).
        size: how many elements (bytes of an untyped storage).
        kind: the storage's class.
        view_of: for a view of another storage in old files, the first element and the number of elements of that one.
    """

    key: str
    dtype: np.dtype[Any] | None
    size: int
    kind: str
    view_of: tuple[int, int] | None = None


@dataclass(frozen=True)
class TensorRecord:
    """A tensor: a strided view of a storage. Offset and strides count elements."""

    storage: Storage
    dtype: np.dtype[Any]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


STORAGE_DTYPES: Mapping[str, npt.DTypeLike | None] = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
    "ComplexFloatStorage": np.complex64,
    "ComplexDoubleStorage": np.complex128,
    "UntypedStorage": None,
}
TORCH_DTYPES: Mapping[str, npt.DTypeLike] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "float8_e8m0fnu": ml_dtypes.float8_e8m0fnu,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
    "complex64": np.complex64,
    "complex128": np.complex128,
}
ORDERED = Name("collections", "OrderedDict")
REBUILD = Name("torch._utils", "_rebuild_tensor")
REBUILD_V2 = Name("torch._utils", "_rebuild_tensor_v2")
REBUILD_V3 = Name("torch._utils", "_rebuild_tensor_v3")
REBUILD_PARAMETER = Name("torch._utils", "_rebuild_parameter")
SIZE = Name("torch", "Size")
ALLOWED = frozenset(
    {ORDERED, REBUILD, REBUILD_V2, REBUILD_V3, REBUILD_PARAMETER, SIZE}
    | {Name("torch", kind) for kind in STORAGE_DTYPES}
    | {Name("torch.storage", "UntypedStorage")}
    | {Name("torch", dtype) for dtype in TORCH_DTYPES}
)
