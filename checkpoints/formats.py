"""Which formats there are, and opening a path with the right one.

A third party adds a format with an entry point of group ``spmd_infer.readers`` whose object is a ``Format``::

    [project.entry-points."spmd_infer.readers"]
    npz = "their_package.npz:FORMAT"
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from spmd_infer.checkpoints import (
    ctranslate2_reader,
    gguf_header,
    gguf_reader,
    manifest_file,
    msgpack_reader,
    native_reader,
    npz_reader,
    orbax_reader,
    safetensors_reader,
    torch_reader,
)
from spmd_infer.checkpoints.folder_files import inside
from spmd_infer.checkpoints.native_reader import NativeReader, Verify
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.checkpoints.remote import is_remote, mirror, url_of
from spmd_infer.errors import CheckpointError, UnknownFormatError

ENTRY_POINT_GROUP = "spmd_infer.readers"
_HEAD_BYTES = 64


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    Attributes:
        name: a short name, the ``stored`` of its readers.
        description: what its paths look like, for error messages.
        detects: whether a path is of this format, from the path and, for a file, its first 64 bytes (empty for a
            folder). It must not raise.
        open: opens such a path; raises CheckpointError when it is damaged.
    """

    name: str
    description: str
    detects: Callable[[Path, bytes], bool]
    open: Callable[[Path], Reader]


def _detects_safetensors(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return (path / safetensors_reader.INDEX_NAME).exists() or any(path.glob("*" + safetensors_reader.SUFFIX))
    if path.suffix == safetensors_reader.SUFFIX:
        return True
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _detects_gguf(path: Path, head: bytes) -> bool:
    return path.is_file() and (gguf_header.is_gguf(head) or path.suffix == gguf_reader.SUFFIX)


NATIVE = Format(
    "native",
    "a folder with manifest.json, as Engine.save, convert and reshard write it",
    lambda path, head: manifest_file.is_native(path),
    native_reader.NativeReader,
)
BUILT_IN: tuple[Format, ...] = (
    NATIVE,
    Format("gguf", "a .gguf file", _detects_gguf, gguf_reader.GgufReader),
    Format(
        "safetensors",
        "a .safetensors file, or a folder with model.safetensors or model.safetensors.index.json",
        _detects_safetensors,
        safetensors_reader.SafetensorsReader,
    ),
    Format(
        "ctranslate2",
        "a CTranslate2 model.bin",
        ctranslate2_reader.is_ctranslate2,
        ctranslate2_reader.CTranslate2Reader,
    ),
    Format("npz", "a NumPy .npz archive", npz_reader.is_npz, npz_reader.NpzReader),
    Format("msgpack", "a Flax .msgpack file", msgpack_reader.is_msgpack, msgpack_reader.MsgpackReader),
    Format(
        "orbax",
        "a folder with a tree that Orbax saved",
        lambda path, head: orbax_reader.is_orbax(path),
        orbax_reader.OrbaxReader,
    ),
    Format("pth", "a PyTorch state dict: .pth, .pt, .bin or .ckpt", torch_reader.is_torch, torch_reader.TorchReader),
)


def open_checkpoint(path: str | os.PathLike[str], *, verify: Verify = "full") -> Reader:
    """Open a checkpoint for reading; only headers are read.

    Args:
        path: a file, a Hugging Face or native folder, or a folder that holds just one checkpoint file; of
            safetensors and native checkpoints also a place in an object store, as ``s3://bucket/folder``.
        verify: how a native checkpoint is checked: ``"full"`` compares the digest of every byte that is read,
            ``"fast"`` sizes and a sample, ``"off"`` sizes alone. Other formats have no digests.

    Raises:
        UnknownFormatError: no format, built in or installed, recognises the path.
        CheckpointError: the path does not exist, or the checkpoint is damaged.
    """
    if is_remote(path):
        return _open_remote(url_of(path), verify)
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder")
    head = _head(path)
    if NATIVE.detects(path, head):
        return NativeReader(path, verify)
    for known in BUILT_IN:
        if known.detects(path, head):
            return known.open(path)
    added, broken = _installed()
    for known in added:
        if known.detects(path, head):
            return known.open(path)
    if path.is_dir():
        inner = [
            file
            for file in sorted(path.iterdir())
            if file.is_file() and any(known.detects(file, _head(file)) for known in (*BUILT_IN, *added))
        ]
        if len(inner) == 1:
            return open_checkpoint(inside(path, inner[0].name))
        if inner:
            names = ", ".join(file.name for file in inner[:8])
            raise CheckpointError(f"{path}: holds {len(inner)} checkpoint files ({names}); give the path of one")
    raise UnknownFormatError(_unknown(path, head, (*BUILT_IN, *added), broken))


def _open_remote(url: str, verify: Verify) -> Reader:
    local = mirror(url)
    try:
        return open_checkpoint(local, verify=verify)
    except CheckpointError as error:
        raise type(error)(str(error).replace(str(local), url)) from error


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _installed() -> tuple[list[Format], list[str]]:
    """Formats of installed packages, and what went wrong with those that could not be imported."""
    formats, broken = [], []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        try:
            loaded = entry.load()
        except Exception as error:  # another package's code may raise anything; the user is told
            broken.append(f"{entry.name} ({entry.value}) cannot be imported: {error}")
            continue
        if isinstance(loaded, Format):
            formats.append(loaded)
        else:
            broken.append(f"{entry.name} ({entry.value}) is a {type(loaded).__name__}, expected a Format")
    return formats, broken


def _unknown(path: Path, head: bytes, formats: tuple[Format, ...], broken: list[str]) -> str:
    if path.is_dir():
        names = sorted(item.name for item in path.iterdir())
        found = f"a folder with {', '.join(names[:10]) or 'nothing'}{', …' if len(names) > 10 else ''}"
    else:
        found = f"a file of {path.stat().st_size} bytes that begins with {head[:16]!r}"
    known = "; ".join(f"{known.name}: {known.description}" for known in formats)
    trouble = f"; readers that failed: {'; '.join(broken)}" if broken else ""
    return f"{path}: no reader knows this format. Found {found}. Known are {known}{trouble}"
