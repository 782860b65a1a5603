"""Jobs of one process: every input and task, going on, what is refused, and full disks (FAULTS 13)."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import spmd_infer as si
from spmd_infer.errors import BatchError, JobError, JobHeldError, TaskError
from spmd_infer.jobs.engines import fingerprint_of
from spmd_infer.jobs.folder import JobFolder
from spmd_infer.jobs.state import read_state
from tests.jobs.conftest import DIGITS, Run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_texts(path: Path, texts: list[Any]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(folder / f"{number:03d}.png")
    return folder


def test_stopped_after_every_unit_and_gone_on_with(shout: Path, tmp_path: Path, run: Run) -> None:
    source = write_texts(tmp_path / "in.jsonl", [f"text {n}" for n in range(23)])
    whole = tmp_path / "whole.jsonl"
    assert run(DIGITS, "shout", source, whole, unit_cost=60).finished
    output, runs = tmp_path / "out.jsonl", 0
    while not run(DIGITS, "shout", source, output, unit_cost=60, units=1).finished:
        assert not output.exists()
        runs += 1
    assert runs > 5
    assert output.read_bytes() == whole.read_bytes()
    assert [line["row"] for line in lines(output)] == list(range(23))
    assert lines(output)[7]["shout"] == "TEXT 7!"
    figures = run(DIGITS, "shout", source, output, unit_cost=60).figures  # a job that is done says so again
    assert figures is not None
    assert (figures.rows, figures.failed, figures.runs) == (23, 0, runs + 1)
    assert sorted(path.name for path in JobFolder(output).path.iterdir()) == ["checkpoint", "done.json", "job.json"]


def test_rows_at_fault_fail_alone(shout: Path, tmp_path: Path, run: Run) -> None:
    texts = [f"text {n}" for n in range(16)]
    clean = tmp_path / "clean.jsonl"
    good = write_texts(tmp_path / "good.jsonl", texts[:3] + texts[4:9] + texts[10:])
    assert run(DIGITS, "shout", good, clean, column="text", options={"mark": "?"}).finished
    mixed: list[Any] = list(texts)
    mixed[3], mixed[9] = 3, ["no text"]
    source, output = write_texts(tmp_path / "in.jsonl", mixed), tmp_path / "out.jsonl"
    source.write_text(source.read_text() + '{"text": "torn\n{"other": 1}\n')
    figures = run(DIGITS, "shout", source, output, column="text", options={"mark": "?"}).figures
    assert figures is not None
    assert (figures.rows, figures.failed, figures.quarantined) == (18, 4, 0)
    # The others were computed as if those rows were not there.
    assert [(line["shout"], line["together"]) for line in lines(output)] == [
        (line["shout"], line["together"]) for line in lines(clean)
    ]
    errors = lines(tmp_path / "out.errors.jsonl")
    assert [error["row"] for error in errors] == [3, 9, 16, 17]
    assert [error["error"]["kind"] for error in errors] == ["TaskError", "TaskError", "Unreadable", "TaskError"]
    assert "3 cannot be shouted" in errors[0]["error"]["message"]
    assert "has no 'text'; it has 'other'" in errors[3]["error"]["message"]


def test_arrays_through_infer(tmp_path: Path, run: Run) -> None:
    images = np.random.default_rng(0).normal(size=(21, 32, 32, 1)).astype(np.float32)
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.savez(folder / "a.npz", image=images[:10])
    np.save(folder / "b.npy", images[10:])
    output = tmp_path / "out.parquet"
    assert run(DIGITS, "infer", folder, output, unit_cost=8 * 1024).finished
    import pyarrow.parquet as pq

    table = pq.read_table(output)
    assert table["row"].to_pylist() == list(range(21))
    assert table["id"].to_pylist()[9:11] == ["a.npz:9", "b.npy:0"]
    expected = si.Engine.load(DIGITS).infer({"image": images})
    (scores,) = expected.values() if isinstance(expected, dict) else (expected,)
    (name,) = set(table.column_names) - {"row", "id"}
    np.testing.assert_allclose(np.array(table[name].to_pylist()), scores, atol=1e-5 * np.abs(scores).max())


def test_rows_of_several_inputs_through_infer(tmp_path: Path, run: Run) -> None:
    image = np.zeros((32, 32, 1), np.float32)
    source = tmp_path / "in.jsonl"
    wrong = [{"image": image[:8].tolist()}, {"picture": image.tolist()}, {"image": [[1], [1, 2]]}, 7]
    source.write_text("".join(json.dumps(row) + "\n" for row in [{"image": image.tolist(), "id": "a"}, *wrong]))
    output = tmp_path / "out.jsonl"
    figures = run(DIGITS, "infer", source, output).figures
    assert figures is not None
    assert (figures.rows, figures.failed) == (5, 4)
    (line,) = lines(output)
    assert line["id"] == "a"
    said = [error["error"]["message"] for error in lines(tmp_path / "out.errors.jsonl")]
    assert "expected" in said[0]
    assert "picture" in said[1]
    assert "ragged" in said[2]
    assert "expected inputs by name" in said[3]


def test_a_folder_of_pictures(tmp_path: Path, run: Run) -> None:
    folder = pictures(tmp_path / "pictures", 9)
    (folder / "004.png").write_bytes(b"no picture")
    output = tmp_path / "out.jsonl"
    figures = run(DIGITS, "classify", folder, output, options={"top": 2}, unit_cost=3 * 1024).figures
    assert figures is not None
    assert (figures.rows, figures.failed, figures.counts, figures.cost) == (9, 1, "pixels", 8 * 1024)
    found = lines(output)
    assert [line["id"] for line in found] == [f"{n:03d}.png" for n in range(9) if n != 4]
    engine = si.Engine.load(DIGITS)
    expected = engine.classify([folder / line["id"] for line in found], top=2)
    assert [[label["index"] for label in line["labels"]] for line in found] == [
        [label.index for label in labels] for labels in expected
    ]
    (error,) = lines(tmp_path / "out.errors.jsonl")
    assert error["id"] == "004.png"
    assert "not a picture" in error["error"]["message"]


@pytest.mark.demo
def test_texts_become_the_vectors_that_the_engine_gives(minilm: Path, tmp_path: Path, run: Run) -> None:
    import pyarrow.parquet as pq

    texts = [f"sentence {n} " + "word " * (n % 11) for n in range(60)] + ["long " * 600]
    source = write_texts(tmp_path / "in.jsonl", texts)
    output, table = tmp_path / "out.jsonl", tmp_path / "out.parquet"
    figures = run(minilm, "embed", source, output, unit_cost=700, mesh="data=1", dtype="float32").figures
    assert run(minilm, "embed", source, table, unit_cost=700, mesh="data=1", dtype="float32").finished
    assert figures is not None
    assert (figures.cut, figures.failed) == (1, 0)
    vectors = np.array([line["embedding"] for line in lines(output)], np.float32)
    assert np.array_equal(vectors, np.array(pq.read_table(table)["embedding"].to_pylist(), np.float32))
    engine = si.Engine.load(minilm, mesh="data=1", dtype="float32")
    with pytest.warns(UserWarning, match="lose their ends"):
        expected = engine.embed(texts)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_prompts_and_scores(llama: Path, tmp_path: Path, run: Run) -> None:
    rows = [{"prompt": "Once upon"}, {"prompt": [50, 35]}, {"prompt": ""}, {"prompt": None}, {"prompt": "hello"}]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    greedy, drawn, again = (tmp_path / f"{name}.jsonl" for name in ("greedy", "drawn", "again"))
    figures = run(llama, "generate", source, greedy, options={"max_tokens": 5}, mesh="data=1").figures
    assert figures is not None
    assert (figures.rows, figures.failed) == (5, 2)
    engine = si.Engine.load(llama, mesh="data=1")
    expected = engine.generate(["Once upon", [50, 35], "hello"], si.SamplingParams(max_tokens=5))
    assert [line["token_ids"] for line in lines(greedy)] == [list(each.token_ids) for each in expected]
    assert [line["text"] for line in lines(greedy)] == [each.text for each in expected]
    for output in (drawn, again):
        options = {"max_tokens": 5, "temperature": 1.5}
        # Units of one row and of all rows: what is drawn depends on the row alone.
        cost = 8 if output == again else None
        assert run(llama, "generate", source, output, options=options, seed=3, unit_cost=cost, mesh="data=1").finished
    assert lines(drawn) == lines(again)
    assert [line["token_ids"] for line in lines(drawn)] != [line["token_ids"] for line in lines(greedy)]

    texts, scored = write_texts(tmp_path / "texts.jsonl", ["The capital", "x"]), tmp_path / "s.jsonl"
    assert run(llama, "score", texts, scored, mesh="data=1").finished
    (line,) = lines(scored)
    (logprobs,) = engine.score(["The capital"])
    np.testing.assert_allclose(line["logprobs"], logprobs, atol=1e-5)
    assert line["sum"] == pytest.approx(float(logprobs.sum()), abs=1e-4)


def test_the_same_job_twice(shout: Path, tmp_path: Path, run: Run) -> None:
    source, output = write_texts(tmp_path / "in.jsonl", ["a", "b"]), tmp_path / "out.jsonl"
    with JobFolder(output).held(), pytest.raises(JobHeldError, match=rf"process {os.getpid()} on .*, since 20"):
        run(DIGITS, "shout", source, output)
    assert run(DIGITS, "shout", source, output).finished


def test_another_job_in_the_same_place(shout: Path, tmp_path: Path, run: Run) -> None:
    source, output = write_texts(tmp_path / "in.jsonl", ["a", "b"] * 9), tmp_path / "out.jsonl"
    assert not run(DIGITS, "shout", source, output, unit_cost=50, units=1).finished
    with pytest.raises(JobError, match="mark was None and is '-'; seed was 0 and is 1"):
        run(DIGITS, "shout", source, output, unit_cost=50, options={"mark": "-"}, seed=1)
    write_texts(source, ["a", "c"] * 9)
    with pytest.raises(JobError, match="is not what it was when the job began"):
        run(DIGITS, "shout", source, output, unit_cost=50)
    assert run(DIGITS, "shout", source, output, unit_cost=50, options={"mark": "-"}, overwrite=True).finished
    assert [line["shout"] for line in lines(output)] == ["A-", "C-"] * 9

    other = tmp_path / "other.jsonl"
    other.write_text("someone's work\n")
    with pytest.raises(JobError, match="exists and is of no job"):
        run(DIGITS, "shout", source, other)
    assert other.read_text() == "someone's work\n"
    assert not run(DIGITS, "shout", source, other, unit_cost=50, overwrite=True, units=1).finished
    assert other.read_text() == "someone's work\n"  # until the new one is whole
    assert run(DIGITS, "shout", source, other, unit_cost=50, overwrite=True).finished
    assert len(lines(other)) == 18


def test_other_weights_than_before(shout: Path, tmp_path: Path, run: Run) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(DIGITS, model)
    source, output = write_texts(tmp_path / "in.jsonl", ["a", "b"] * 9), tmp_path / "out.jsonl"
    assert not run(model, "shout", source, output, unit_cost=50, units=1).finished
    before = fingerprint_of(si.Engine.load(model))
    assert before == fingerprint_of(si.Engine.load(shutil.copytree(model, tmp_path / "elsewhere")))
    (file,) = model.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(JobError, match="the model's files are others"):
        run(model, "shout", source, output, unit_cost=50)


def test_what_cannot_begin(shout: Path, tmp_path: Path, run: Run) -> None:
    source = write_texts(tmp_path / "in.jsonl", ["a"])
    with pytest.raises(JobError, match=r"must end in \.jsonl or \.parquet"):
        run(DIGITS, "shout", source, tmp_path / "out.csv")
    with pytest.raises(TaskError, match="there is no task 'sing'"):
        run(DIGITS, "sing", source, tmp_path / "out.jsonl")
    with pytest.raises(JobError, match="No such file or directory"):
        run(DIGITS, "shout", source, tmp_path / "nowhere" / "out.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(JobError, match="has no rows"):
        run(DIGITS, "shout", tmp_path / "empty.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(BatchError, match="there is no such file"):
        run(DIGITS, "shout", tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(TaskError, match="no options of generate"):
        run(DIGITS, "generate", source, tmp_path / "out.jsonl", options={"max_length": 3})
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def test_a_disk_that_fills_up(shout: Path, small_disk: Path, tmp_path: Path, run: Run) -> None:
    texts = [f"{n} " + "x" * 20_000 for n in range(40)]  # 800 kB of results, and as much again to put them together
    source, output, whole = (
        write_texts(tmp_path / "in.jsonl", texts),
        small_disk / "out.jsonl",
        tmp_path / "whole.jsonl",
    )
    assert run(DIGITS, "shout", source, whole, unit_cost=100_000).finished
    output.write_text("the output of before\n")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(600_000))
    with pytest.raises(JobError, match=r"No space left on device; what was done before is kept"):
        run(DIGITS, "shout", source, output, unit_cost=100_000, overwrite=True)
    kept = len(read_state(JobFolder(output).logs()).done)
    assert kept >= 2
    assert output.read_text() == "the output of before\n"
    filler.unlink()
    with pytest.raises(JobError, match=r"No space left on device.* bytes are free there"):  # while it is put together
        run(DIGITS, "shout", source, output, unit_cost=100_000, overwrite=True)
    assert output.read_text() == "the output of before\n"
    assert sorted(path.name for path in small_disk.iterdir()) == ["out.jsonl", "out.jsonl.job"]
    remount(small_disk, "4m")
    outcome = run(DIGITS, "shout", source, output, unit_cost=100_000, overwrite=True)
    assert outcome.figures is not None
    assert outcome.figures.runs == 3
    assert output.read_bytes() == whole.read_bytes()
