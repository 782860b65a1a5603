"""Damaged and hostile GGUF files: each a CheckpointError that names the file, before memory is taken."""

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint
from tests.checkpoints.malformed import changed, read_or_refused, refused

F32, Q4_0 = GGMLQuantizationType.F32, GGMLQuantizationType.Q4_0
GIANT = (1 << 64) - 1


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def field(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, length: int, items: bytes) -> bytes:
    return struct.pack("<IQ", kind, length) + items


def tensor(
    name: str | bytes = "w", dims: tuple[int, ...] = (4, 2), kind: int = F32, offset: int = 0, rank: int | None = None
) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims) if rank is None else rank)
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


ONE_TENSOR = (tensor(),)


def file(
    fields: Sequence[bytes] = (),
    tensors: Sequence[bytes] = ONE_TENSOR,
    data: int = 64,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    field_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    header = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if tensor_count is None else tensor_count,
        len(fields) if field_count is None else field_count,
    )
    header += b"".join(fields) + b"".join(tensors)
    return header + bytes(-len(header) % 32) + bytes(data)


U8, U32, STRING, ARRAY = GGUFValueType.UINT8, GGUFValueType.UINT32, GGUFValueType.STRING, GGUFValueType.ARRAY
ARCHITECTURE = field("general.architecture", STRING, string("llama"))
NESTED = b"".join(struct.pack("<IQ", ARRAY, 1) for _ in range(40)) + array(U8, 1, b"\1")

CASES: dict[str, bytes] = {
    "empty": b"",
    "magic only": b"GGUF",
    "wrong magic": file(magic=b"GGML"),
    "version 1": file(version=1),
    "version 4": file(version=4),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "header cut after the counts": file()[:24],
    "header cut in a field": file([ARCHITECTURE])[:50],
    "header cut in a tensor": file()[:40],
    "data cut": file(data=31),
    "data missing": file(data=0),
    "giant tensor count": file(tensor_count=GIANT),
    "tensor count of 2**40": file(tensor_count=1 << 40),
    "tensor count too high": file(tensor_count=2),
    "giant field count": file(field_count=GIANT),
    "field count of 2**40": file(field_count=1 << 40),
    "field count too high": file([ARCHITECTURE], field_count=2),
    "giant field name": file([string("n", GIANT) + struct.pack("<I", U32) + bytes(4)]),
    "field name of 2**40": file([string("n", 1 << 40) + struct.pack("<I", U32) + bytes(4)]),
    "field name not UTF-8": file([field(b"\xff\xfe", U32, bytes(4))]),
    "field name twice": file([ARCHITECTURE, ARCHITECTURE]),
    "unknown field type": file([field("a", 99, bytes(8))]),
    "giant string": file([field("a", STRING, string("x", GIANT))]),
    "string of 2**40": file([field("a", STRING, string("x", 1 << 40))]),
    "string not UTF-8": file([field("a", STRING, string(b"\xc3\x28"))]),
    "giant array": file([field("a", ARRAY, array(U8, GIANT, b""))]),
    "array of 2**40": file([field("a", ARRAY, array(U32, 1 << 40, b""))]),
    "array of 2**61 doubles": file([field("a", ARRAY, array(GGUFValueType.FLOAT64, 1 << 61, b""))]),
    "array of 2**40 strings": file([field("a", ARRAY, array(STRING, 1 << 40, b""))]),
    "array of 2**40 arrays": file([field("a", ARRAY, array(ARRAY, 1 << 40, b""))]),
    "array of unknown type": file([field("a", ARRAY, array(77, 1, bytes(8)))]),
    "arrays nested deeply": file([field("a", ARRAY, NESTED)]),
    "alignment zero": file([field("general.alignment", U32, struct.pack("<I", 0))]),
    "alignment not a power of two": file([field("general.alignment", U32, struct.pack("<I", 24))]),
    "alignment giant": file([field("general.alignment", U32, struct.pack("<I", 1 << 31))]),
    "alignment a string": file([field("general.alignment", STRING, string("32"))]),
    "giant tensor name": file(tensors=[string("w", GIANT) + tensor()[9:]]),
    "tensor name not UTF-8": file(tensors=[tensor(b"\xff")]),
    "tensor name twice": file(tensors=[tensor(), tensor(offset=32)], data=128),
    "giant rank": file(tensors=[tensor(rank=(1 << 32) - 1)]),
    "rank 5": file(tensors=[tensor(dims=(1, 1, 1, 1, 1))]),
    "giant dimension": file(tensors=[tensor(dims=(GIANT, 2))]),
    "dimensions that overflow": file(tensors=[tensor(dims=(1 << 32, 1 << 32))]),
    "dimensions that overflow to zero": file(tensors=[tensor(dims=(1 << 32, 1 << 32, 1 << 32))]),
    "zero beside giants": file(tensors=[tensor(dims=(0, 1 << 62, 1 << 62))]),
    "larger than the file": file(tensors=[tensor(dims=(4, 1000))]),
    "unknown encoding": file(tensors=[tensor(kind=4)]),
    "giant encoding": file(tensors=[tensor(kind=(1 << 32) - 1)]),
    "rows that blocks do not fill": file(tensors=[tensor(dims=(33, 2), kind=Q4_0)]),
    "scalar of blocks": file(tensors=[tensor(dims=(), kind=Q4_0)]),
    "giant offset": file(tensors=[tensor(offset=GIANT)]),
    "offset of 2**63": file(tensors=[tensor(offset=1 << 63)]),
    "offset past the end": file(tensors=[tensor(offset=64)]),
    "offset not aligned": file(tensors=[tensor(offset=8)]),
    "overlap": file(tensors=[tensor("a", (8, 2)), tensor("b", offset=32)]),
    "same place": file(tensors=[tensor("a"), tensor("b")]),
    "split count a string": file([ARCHITECTURE, field("split.count", STRING, string("3"))]),
}


@pytest.mark.parametrize("content", CASES.values(), ids=CASES.keys())
def test_file(content: bytes, tmp_path: Path) -> None:
    refused(content, tmp_path / "bad.gguf")


def test_the_sound_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(file([ARCHITECTURE], [tensor("a"), tensor("b", offset=32)]))
    reader = open_checkpoint(path)
    assert [info.shape for info in reader.tensors.values()] == [(2, 4), (2, 4)]
    assert reader.architecture == "llama"


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_bytes_never_do_worse_than_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    sound = file(
        [ARCHITECTURE, field("llama.block_count", U32, struct.pack("<I", 2)), field("a", ARRAY, array(U8, 3, b"abc"))],
        [tensor("a"), tensor("b", (32, 2), Q4_0, 32)],
        data=128,
    )
    content = changed(sound, data, most=3, first=4)
    path = tmp_path_factory.getbasetemp() / "fuzz.gguf"
    path.write_bytes(content[: data.draw(st.integers(len(content) - 140, len(content)))])
    read_or_refused(path)
