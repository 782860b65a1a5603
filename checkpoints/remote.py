"""Checkpoints in object stores (``s3://``, ``gs://``), through the storage layer that TensorStore has.

Reading makes a folder on the local disk that looks like the remote one: small files are downloaded, of the large ones
only the header. Their names stand for the objects: ``FileBytes`` reads the ranges that are wanted from those. So the
readers need not know.

Credentials come from the environment as usual (``AWS_ACCESS_KEY_ID`` or a profile; Google's default credentials).
``AWS_ENDPOINT_URL`` and ``AWS_REGION`` name another server than Amazon's.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from spmd_infer.errors import CheckpointError

_URL = re.compile(r"(s3|gs):/{1,2}([^/]+)/*(.*?)/*")  # Path("s3://bucket/x") has one slash less
_SMALL_BYTES = 256 << 20
_MOST_HEADER = 100 << 20
_MOST_OBJECTS = 100_000
_SMALL = (".json", ".sha256", ".txt", ".jinja", ".model")
_UNREADABLE = (ValueError, OSError, RuntimeError, TimeoutError)


@dataclass(frozen=True)
class RemoteObject:
    """One object, and its size as the checkpoint gives it."""

    store: Any
    url: str
    key: str
    size: int

    def read(self, offset: int, count: int) -> bytes:
        """Some of its bytes.

        Raises:
            CheckpointError: it ends before, is gone, or cannot be read.
        """
        found = _read(self.store, self.url, self.key, slice(offset, offset + count))
        if found is None or len(found) != count:
            raise CheckpointError(f"{self.url}/{self.key}: ends before byte {offset + count}")
        return found


_mirrors: dict[Path, tuple[str, tempfile.TemporaryDirectory[str]]] = {}
_objects: dict[Path, RemoteObject] = {}


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a place in an object store."""
    return _URL.fullmatch(os.fspath(path)) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """The place as it is usually written, also where ``Path`` took a slash away."""
    found = _URL.fullmatch(os.fspath(path))
    assert found is not None
    scheme, bucket, prefix = found.groups()
    return f"{scheme}://{bucket}/{prefix}".rstrip("/")


def object_at(path: Path) -> RemoteObject | None:
    """The object that a local name stands for; None for ordinary files."""
    return _objects.get(path)


def named(path: Path) -> str:
    """What a path is called outside this process: a URL where it stands for a remote place."""
    for folder, (url, _) in _mirrors.items():
        if path.is_relative_to(folder):
            return f"{url}/{path.relative_to(folder).as_posix()}".removesuffix("/.")
    return str(path.resolve())


def open_store(url: str) -> Any:
    """The objects below a place.

    Raises:
        CheckpointError: the store cannot be opened.
    """
    import tensorstore

    scheme, bucket, prefix = _URL.fullmatch(url).groups()  # type: ignore[union-attr]  # callers have checked
    spec: dict[str, Any] = {"driver": "gcs" if scheme == "gs" else "s3", "bucket": bucket}
    if prefix:
        spec["path"] = prefix + "/"
    if scheme == "s3" and (endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")):
        spec["endpoint"] = endpoint
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if scheme == "s3" and region:
        spec["aws_region"] = region
    try:
        return tensorstore.KvStore.open(spec).result()
    except _UNREADABLE as error:
        raise CheckpointError(f"{url}: cannot be opened: {error}") from error


def mirror(url: str) -> Path:
    """A local folder, or file, that stands for a remote one until the process ends.

    Raises:
        CheckpointError: there is nothing, it cannot be read, or it holds names that no checkpoint has.
    """
    store, only = open_store(url), None
    keys = keys_of(store, url)
    if not keys:
        folder, _, only = url.rpartition("/")
        store, url, keys = open_store(folder), folder, [only]
        if _read(store, url, only, slice(0, 1)) is None:
            raise CheckpointError(f"{url}/{only}: there is no such object, and none below it")
    temporary = tempfile.TemporaryDirectory(prefix="spmd-infer-remote-")
    home = Path(temporary.name).resolve()
    _mirrors[home] = (url, temporary)
    for key in keys:
        if key.endswith(_SMALL):
            _local(home, key).write_bytes(_small(store, url, key))
        elif key.endswith(".safetensors"):
            _stand_in(home, *_safetensors(store, url, key))
    if "manifest.json" in keys:
        for key, nbytes in _data_files(home).items():
            if key in keys:
                _stand_in(home, RemoteObject(store, url, key, _true_size(store, url, key, nbytes)), b"")
    return home / only if only is not None else home


def keys_of(store: Any, url: str) -> list[str]:
    """The names of all objects in a store, checked to be plain paths.

    Raises:
        CheckpointError: the store cannot be listed, or holds other names.
    """
    try:
        keys = [key.decode("utf-8") for key in store.list().result()]
    except (*_UNREADABLE, UnicodeDecodeError) as error:
        raise CheckpointError(f"{url}: cannot be listed: {error}") from error
    if len(keys) > _MOST_OBJECTS:
        raise CheckpointError(f"{url}: holds {len(keys)} objects, more than the {_MOST_OBJECTS} that a checkpoint has")
    for key in keys:
        if PurePosixPath(key).as_posix() != key.rstrip("/") or ".." in PurePosixPath(key).parts or "\\" in key:
            raise CheckpointError(f"{url}: object name {key!r} is not a plain path")
    return [key for key in keys if not key.endswith("/")]


def _small(store: Any, url: str, key: str) -> bytes:
    if _read(store, url, key, slice(_SMALL_BYTES, _SMALL_BYTES + 1)):
        raise CheckpointError(f"{url}/{key}: is larger than the {_SMALL_BYTES} bytes that such a file may have")
    found = _read(store, url, key, None)
    if found is None:
        raise CheckpointError(f"{url}/{key}: is gone")
    return found


def _safetensors(store: Any, url: str, key: str) -> tuple[RemoteObject, bytes]:
    """A safetensors file's object, its size as its header gives it, and the header; the reader checks both."""
    start = _read(store, url, key, slice(0, 8)) or b""
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > _MOST_HEADER:
        raise CheckpointError(f"{url}/{key}: is not a safetensors file: its header claims {length} bytes")
    text = _read(store, url, key, slice(8, 8 + length)) or b""
    ends = [0]
    try:
        header = json.loads(text)
        ends += [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{url}/{key}: its header is no safetensors header: {error!r}") from error
    size = 8 + length + max(ends)
    return RemoteObject(store, url, key, _true_size(store, url, key, size)), start + text


def _true_size(store: Any, url: str, key: str, claimed: int) -> int:
    """The size that an object should have, or one that differs where it has another."""
    if claimed and not _read(store, url, key, slice(claimed - 1, claimed)):
        return claimed - 1
    return claimed + len(_read(store, url, key, slice(claimed, claimed + 1)) or b"")


def _data_files(home: Path) -> Mapping[str, int]:
    """The data files that a manifest lists; none where it is damaged, which its reader will say."""
    try:
        data = json.loads((home / "manifest.json").read_bytes())["data"]
        return {str(entry["name"]): int(entry["nbytes"]) for entry in data if 0 <= int(entry["nbytes"]) < 1 << 50}
    except (ValueError, TypeError, KeyError, RecursionError):
        return {}


def _stand_in(home: Path, found: RemoteObject, head: bytes) -> None:
    """A file of the object's size that takes no room beyond its head."""
    file = _local(home, found.key)
    try:
        with file.open("wb") as handle:
            handle.write(head)
            handle.truncate(max(found.size, len(head)))
    except OSError as error:
        raise CheckpointError(f"{found.url}/{found.key}: cannot have {found.size} bytes: {error.strerror}") from error
    _objects[file] = found


def _local(home: Path, key: str) -> Path:
    file = home / key
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def _read(store: Any, url: str, key: str, part: slice | None) -> bytes | None:
    """An object or a part of it; None where there is none, nothing where the part begins behind its end."""
    try:
        found = store.read(key, byte_range=part).result()
    except _UNREADABLE as error:
        if "OUT_OF_RANGE" in str(error):
            return b""
        raise CheckpointError(f"{url}/{key}: cannot be read: {str(error)[:400]}") from error
    return found.value if found.state == "value" else None
