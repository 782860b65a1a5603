"""``spmd-infer batch`` as a person runs it."""

import json
from pathlib import Path

from tests.cli.test_commands import run
from tests.jobs.conftest import DIGITS
from tests.jobs.test_run import lines, pictures


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    folder, output = pictures(tmp_path / "pictures", 12), tmp_path / "labels.jsonl"
    (folder / "005.png").write_bytes(b"no picture")
    command = ["batch", DIGITS, str(folder), str(output), "--top", "1", "--unit-cost", str(4 * 1024)]
    planned = run(*command, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout) == {
        "task": "classify",
        "format": "images",
        "rows": 12,
        "pixels": 11 * 1024,
        "units": 3,
        "ranks": [{"rank": 0, "units": 3, "rows": 12, "pixels": 11 * 1024}],
    }
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]

    answer = run(*command, "--devices", "2", "--strict", "--json")
    assert answer.returncode == 9, answer.stderr
    figures = json.loads(answer.stdout)
    assert (figures["rows"], figures["failed"], figures["written"]) == (12, 1, str(output))
    assert figures["errors"] == str(tmp_path / "labels.errors.jsonl")
    assert [line["id"] for line in lines(output)] == [f"{n:03d}.png" for n in range(12) if n != 5]
    assert all(len(line["labels"]) == 1 for line in lines(output))

    again = run(*command, "--set", "top=2")
    assert again.returncode == 7
    assert "top was 1 and is 2" in again.stderr
    assert "Traceback" not in again.stderr


def test_what_cannot_begin(tmp_path: Path) -> None:
    missing = run("batch", DIGITS, str(tmp_path / "none.jsonl"), str(tmp_path / "out.jsonl"))
    assert missing.returncode == 4
    assert "there is no such file" in missing.stderr
    (tmp_path / "in.jsonl").write_text('"text"\n')
    wrong = run("batch", DIGITS, str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--set", "top")
    assert wrong.returncode == 4
    assert "expected NAME=VALUE" in wrong.stderr
    assert "Traceback" not in missing.stderr + wrong.stderr
