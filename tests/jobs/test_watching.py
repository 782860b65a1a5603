"""Progress is that of all ranks, with a rate and the time left."""

import re
import time
from pathlib import Path

import pytest

from spmd_infer import progress
from spmd_infer.jobs import watching
from spmd_infer.jobs.log import Log


def test_what_all_ranks_have_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "EVERY_S", 0.01)
    logs = [tmp_path / "0001-00", tmp_path / "0001-01"]
    seen: list[int] = []
    with watching.watched(logs, {0: 5, 1: 7, 2: 11}, seen.append):
        first = Log(logs[0])
        first.begin(0)
        first.done(0, 1, 0, 0, b"x" * 100_000, b"")
        deadline = time.monotonic() + 10
        while sum(seen) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert seen == [5]
        Log(logs[1]).done(2, 1, 0, 0, b"y", b"")
    assert sum(seen) == 16


def test_a_line_says_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.0)
    with progress.progress("batch", 4000, unit="tokens") as advance:
        time.sleep(0.1)
        advance(1000)
    said = capsys.readouterr().err
    found = re.fullmatch(r"batch: 1,000 of 4,000 tokens, ([\d,]+) tokens/s, (\d) s left\n", said)
    assert found, said
    assert 1000 < float(found[1].replace(",", "")) <= 10_000
