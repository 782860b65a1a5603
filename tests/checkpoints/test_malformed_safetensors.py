"""Damaged and hostile safetensors files and folders: each a CheckpointError that names the file."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.errors import CheckpointError
from tests.checkpoints.malformed import changed, read_or_refused, refused

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}


def made(header: Any, data: int = 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


SOUND = made({"a": A, "b": B})

FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "random text": b"this is not a safetensors file at all",
    "header longer than the file": made({"a": A}, 8, length=1 << 20),
    "header of 2**63 bytes": made({"a": A}, 8, length=1 << 63),
    "header of 2**64-1 bytes": made({"a": A}, 8, length=(1 << 64) - 1),
    "header cut": SOUND[:40],
    "data cut": SOUND[:-1],
    "data missing": SOUND[:-16],
    "data too long": SOUND + b"\0",
    "header is a list": made([1, 2]),
    "header is not JSON": made(b"{'a': 1}"),
    "header is not UTF-8": made(b'{"\xff": {}}'),
    "header nested deeply": made(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "entry is a number": made({"a": 3}),
    "no dtype": made({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "no shape": made({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "no offsets": made({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "unknown dtype": made({"a": A | {"dtype": "F31"}}, 8),
    "packed dtype": made({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1),
    "negative offset": made({"a": A | {"data_offsets": [-8, 0]}}, 8),
    "offsets reversed": made({"a": A | {"data_offsets": [8, 0]}}, 8),
    "offset past the end": made({"a": A | {"data_offsets": [1000, 1008]}}, 8),
    "offset of 2**63": made({"a": A | {"data_offsets": [1 << 63, (1 << 63) + 8]}}, 8),
    "fractional offset": made({"a": A | {"data_offsets": [0.5, 8.5]}}, 8),
    "three offsets": made({"a": A | {"data_offsets": [0, 8, 16]}}, 16),
    "overlap": made({"a": A, "b": A | {"data_offsets": [4, 12]}}, 12),
    "hole": made({"a": A, "b": A | {"data_offsets": [12, 20]}}, 20),
    "shape too small": made({"a": A | {"shape": [1]}}, 8),
    "shape too large": made({"a": A | {"shape": [3]}}, 8),
    "shape overflows": made({"a": A | {"shape": [1 << 62, 1 << 62]}}, 8),
    "shape negative": made({"a": A | {"shape": [-2]}}, 8),
    "zero beside giants": made({"a": {"dtype": "F32", "shape": [0, 1 << 62, 1 << 62], "data_offsets": [0, 0]}}, 0),
    "hundred dimensions": made({"a": {"dtype": "U8", "shape": [1] * 100, "data_offsets": [0, 1]}}, 1),
    "name twice": made(b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(B).encode()), 16),
    "name twice, same place": made(b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(A).encode()), 8),
    "metadata is a number": made({"__metadata__": 3, "a": A}, 8),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES.keys())
def test_file(content: bytes, tmp_path: Path) -> None:
    refused(content, tmp_path / "bad.safetensors")


def test_the_sound_file_opens(tmp_path: Path) -> None:
    file = tmp_path / "good.safetensors"
    file.write_bytes(SOUND)
    assert list(open_checkpoint(file).tensors) == ["a", "b"]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_changed_bytes_never_do_worse_than_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = changed(SOUND, data)
    file = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    read_or_refused(file)


def _index(folder: Path, weight_map: Any, **others: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, **others}))


def _shard(folder: Path, name: str, *tensors: str) -> None:
    save_file({tensor: np.ones(2, np.float32) for tensor in tensors}, folder / name)


def _no_weight_map(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{}")


def _broken_json(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def _index_is_a_list(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def _shard_missing(folder: Path) -> None:
    _shard(folder, "one.safetensors", "a")
    _index(folder, {"a": "one.safetensors", "b": "two.safetensors"})


def _tensor_missing(folder: Path) -> None:
    _shard(folder, "one.safetensors", "a")
    _index(folder, {"a": "one.safetensors", "b": "one.safetensors"})


def _tensor_in_two_shards(folder: Path) -> None:
    _shard(folder, "one.safetensors", "a", "b")
    _shard(folder, "two.safetensors", "b")
    _index(folder, {"a": "one.safetensors", "b": "two.safetensors"})


def _shard_damaged(folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(SOUND[:-1])
    _index(folder, {"a": "one.safetensors"})


def _outside(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _shard(folder.parent, "outside.safetensors", "a")
        _index(folder, {"a": name.replace("PARENT", str(folder.parent))})

    return make


def _link_outside(folder: Path) -> None:
    _shard(folder.parent, "outside.safetensors", "a")
    (folder / "one.safetensors").symlink_to("../outside.safetensors")
    _index(folder, {"a": "one.safetensors"})


def _single_link_outside(folder: Path) -> None:
    _shard(folder.parent, "outside.safetensors", "a")
    (folder / "model.safetensors").symlink_to("../outside.safetensors")


def _link_loop(folder: Path) -> None:
    (folder / "one.safetensors").symlink_to("one.safetensors")
    _index(folder, {"a": "one.safetensors"})


def _file_name_is_a_number(folder: Path) -> None:
    _index(folder, {"a": 3})


def _two_files_without_index(folder: Path) -> None:
    _shard(folder, "one.safetensors", "a")
    _shard(folder, "two.safetensors", "b")


def _config_damaged(folder: Path) -> None:
    _shard(folder, "model.safetensors", "a")
    (folder / "config.json").write_text("{")


def _config_is_a_list(folder: Path) -> None:
    _shard(folder, "model.safetensors", "a")
    (folder / "config.json").write_text("[1]")


def _config_links_outside(folder: Path) -> None:
    _shard(folder, "model.safetensors", "a")
    (folder.parent / "secret.json").write_text("{}")
    (folder / "config.json").symlink_to("../secret.json")


def _config_is_huge(folder: Path) -> None:
    _shard(folder, "model.safetensors", "a")
    (folder / "config.json").touch()
    os.truncate(folder / "config.json", 1 << 34)  # sparse


FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weight map": (_no_weight_map, r"index\.json: expected a 'weight_map'"),
    "broken JSON": (_broken_json, r"index\.json: expected a JSON object"),
    "index is a list": (_index_is_a_list, r"index\.json: expected a JSON object, found a list"),
    "shard missing": (_shard_missing, r"1 of 2 files that it names are not there: two\.safetensors"),
    "tensor missing": (_tensor_missing, r"one\.safetensors: 1 tensors .* not in it: b"),
    "tensor in two shards": (_tensor_in_two_shards, r"two\.safetensors: tensor 'b' is also in .*one\.safetensors"),
    "shard damaged": (_shard_damaged, r"one\.safetensors: not a valid safetensors file"),
    "parent folder": (_outside("../outside.safetensors"), r"'\.\./outside\.safetensors' is not a plain name"),
    "absolute path": (_outside("PARENT/outside.safetensors"), "is not a plain name"),
    "backslashes": (_outside("..\\outside.safetensors"), "is not a plain name"),
    "dots": (_outside(".."), "is not a plain name"),
    "empty name": (_outside(""), "is not a plain name"),
    "null byte": (_outside("a\0b"), "is not a plain name"),
    "link outside": (_link_outside, r"one\.safetensors: is a link to .*outside\.safetensors, outside its folder"),
    "single link outside": (_single_link_outside, r"model\.safetensors: is a link to .*, outside its folder"),
    "link loop": (_link_loop, r"one\.safetensors"),
    "file name is a number": (_file_name_is_a_number, "mapped to 3, expected a file name"),
    "two files, no index": (_two_files_without_index, r"2 safetensors files but no model\.safetensors\.index\.json"),
    "config damaged": (_config_damaged, r"config\.json: expected a JSON object"),
    "config is a list": (_config_is_a_list, r"config\.json: expected a JSON object, found a list"),
    "config links outside": (_config_links_outside, r"config\.json: is a link to .*secret\.json, outside its folder"),
    "config is huge": (_config_is_huge, r"config\.json: 17179869184 bytes of JSON"),
}


@pytest.mark.parametrize(("make", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folder(make: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    make(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(folder)
    assert str(folder) in str(caught.value)
