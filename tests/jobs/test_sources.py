"""Rows of each kind of input; reading any run of them again gives the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spmd_infer.errors import BatchError, JobError
from spmd_infer.jobs import parquet
from spmd_infer.jobs.files import LONE, ArrayFiles, PictureFiles
from spmd_infer.jobs.jsonl import JsonLines
from spmd_infer.jobs.rows import Row, Source
from spmd_infer.jobs.sources import format_of, open_source


def plain(rows: list[Row]) -> list[Any]:
    """Rows that can be compared."""
    return [
        (row.index, row.id, row.problem, row.value if not isinstance(row.value, dict) else
         {key: np.asarray(value).tolist() for key, value in row.value.items()})
        for row in rows
    ]  # fmt: skip


def check(source: Source) -> list[Row]:
    """All rows, after every run of them has been read by itself."""
    scanned = list(source.scan())
    rows = [row for _, row in scanned]
    assert [row.index for row in rows] == list(range(len(rows)))
    for first in range(len(rows)):
        for count in {1, min(2, len(rows) - first), len(rows) - first}:
            part = source.read(first, count, scanned[first][0])
            assert plain(part) == plain(rows[first : first + count])
    return rows


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b'{"text": "caf\xc3\xa9", "id": "a"}\n\n  \n"plain"\r\nnot json\n'
        b'{"id": 7, "text": "x"}\n\xff\xfe\n{"text": "cut o'
    )
    rows = check(JsonLines(path))
    assert [row.id for row in rows] == ["a", None, None, 7, None, None]
    assert rows[0].value == {"text": "café", "id": "a"}
    assert rows[1].value == "plain"
    assert [bool(row.problem) for row in rows] == [False, False, True, False, True, True]
    assert "not JSON" in rows[2].problem
    before = JsonLines(path).fingerprint()
    path.write_bytes(path.read_bytes().replace(b"plain", b"plane"))
    assert JsonLines(path).fingerprint() != before


def test_deeply_nested_json_is_a_row_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("[" * 100_000 + "\n" + '"good"\n')
    assert [bool(row.problem) for row in check(JsonLines(path))] == [True, False]


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "in.parquet"
    table = pa.table({"text": [f"row {n}" for n in range(11)], "id": list(range(100, 111)), "other": [0.5] * 11})
    pq.write_table(table, path, row_group_size=3)
    rows = check(open_source(path, "parquet", None))
    assert [row.value["text"] for row in rows] == [f"row {n}" for n in range(11)]
    assert [row.id for row in rows] == list(range(100, 111))
    assert set(check(open_source(path, "parquet", "text"))[0].value) == {"text", "id"}
    with pytest.raises(BatchError, match="no column 'txt'; it has text, id, other"):
        open_source(path, "parquet", "txt")
    path.write_bytes(b"nonsense")
    with pytest.raises(BatchError, match="is not a Parquet file"):
        open_source(path, "parquet", None)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(JobError, match=r"pip install 'spmd-infer\[batch\]'"):
        open_source(tmp_path / "in.parquet", "parquet", None)


def test_parquet_out_keeps_shapes_and_finds_types_in_any_part(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    first = parquet.encode_table([{"row": 0, "id": None, "v": np.arange(3, dtype=np.float32), "note": None}])
    second = parquet.encode_table(
        [
            {"row": 1, "id": 5, "v": np.ones(3, np.float32), "note": "x", "map": np.zeros((2, 2), np.float32)},
            {"row": 2, "id": "b", "v": np.zeros(3, np.float32), "note": "y", "map": np.eye(2, dtype=np.float32)},
        ]
    )
    streams = [first, b"", second]
    parquet.write_parquet(tmp_path / "out.parquet", iter(streams), iter(streams))
    table = pq.read_table(tmp_path / "out.parquet")
    assert table["row"].to_pylist() == [0, 1, 2]
    assert table["id"].to_pylist() == [None, "5", "b"]
    assert str(table.schema.field("v").type) == "list<element: float>"
    assert table["map"].to_pylist() == [None, [0, 0, 0, 0], [1, 0, 0, 1]]
    assert table["map_shape"].to_pylist() == [None, [2, 2], [2, 2]]
    assert table["note"].to_pylist() == [None, "x", "y"]


def test_arrays(tmp_path: Path) -> None:
    folder = tmp_path / "arrays"
    (folder / "sub").mkdir(parents=True)
    np.savez(folder / "a.npz", x=np.arange(6).reshape(3, 2), y=np.arange(3))
    np.savez(folder / "sub" / "b.npz", x=np.arange(2).reshape(1, 2), y=np.zeros(1))
    rows = check(ArrayFiles(folder))
    assert [row.id for row in rows] == ["a.npz:0", "a.npz:1", "a.npz:2", "sub/b.npz:0"]
    assert rows[1].value["x"].tolist() == [2, 3]
    assert format_of(folder) == "arrays"
    np.save(tmp_path / "one.npy", np.arange(4.0).reshape(2, 2))
    (first, second) = check(ArrayFiles(tmp_path / "one.npy"))
    assert first.value[LONE].tolist() == [0, 1]
    assert second.id == "one.npy:1"

    np.savez(folder / "c.npz", x=np.zeros((2, 2)), y=np.zeros(3))
    with pytest.raises(BatchError, match="as many rows each"):
        ArrayFiles(folder)
    np.save(folder / "c.npy", np.array([object()]), allow_pickle=True)
    (folder / "c.npz").unlink()
    with pytest.raises(BatchError, match="does not hold plain arrays"):
        ArrayFiles(folder)


def test_pictures(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "deep/c.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)
    (tmp_path / "notes.txt").write_text("no picture")
    rows = check(PictureFiles(tmp_path))
    assert [row.id for row in rows] == ["a.jpg", "b.png", "deep/c.png"]
    assert rows[0].value == str(tmp_path / "a.jpg")
    assert format_of(tmp_path) == "images"


def test_what_an_input_is(tmp_path: Path) -> None:
    request = {"custom_id": "1", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}}
    (tmp_path / "requests.jsonl").write_text("broken\n" + json.dumps(request) + "\n")
    (tmp_path / "texts.jsonl").write_text('{"custom_id": "1", "text": "x"}\n')
    assert format_of(tmp_path / "requests.jsonl") == "openai"
    assert format_of(tmp_path / "texts.jsonl") == "jsonl"
    with pytest.raises(BatchError, match="there is no such file"):
        format_of(tmp_path / "none.jsonl")
    (tmp_path / "x.csv").write_text("a,b\n")
    with pytest.raises(BatchError, match="say what it is with --format"):
        format_of(tmp_path / "x.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BatchError, match="neither arrays"):
        format_of(tmp_path / "empty")
