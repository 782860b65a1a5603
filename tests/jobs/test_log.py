"""What a rank wrote before it died counts as far as it is whole."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.errors import JobError
from spmd_infer.jobs.log import Judged, Log, LogReader
from spmd_infer.jobs.state import CRASHES, read_state


def write_three_units(path: Path) -> list[int]:
    """A log of three units; where each of them ends."""
    log, ends = Log(path), []
    for unit in range(3):
        log.begin(unit)
        log.done(unit, 2, 1, 0, f"results of {unit}\nwith two lines\n".encode() * (unit + 1), b'{"error":1}\n')
        ends.append(path.stat().st_size)
    log.close()
    return ends


def test_cut_off_at_every_byte(tmp_path: Path) -> None:
    whole = tmp_path / "0001-00"
    ends = write_three_units(whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut"
    for size in range(len(content) + 1):
        cut.write_bytes(content[:size])
        state = read_state([cut])
        finished = sum(end <= size for end in ends)
        assert sorted(state.done) == list(range(finished)), size
        for unit, place in state.done.items():
            assert place.results() == f"results of {unit}\nwith two lines\n".encode() * (unit + 1)
            assert place.errors() == b'{"error":1}\n'
        assert sum(state.crashes.values()) <= 1  # the one that was under way


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_never_taken_for_a_result(at: int, bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "0001-00"
    write_three_units(path)
    before = {unit: (place.results(), place.errors()) for unit, place in read_state([path]).done.items()}
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1 << bit
    path.write_bytes(content)
    for unit, place in read_state([path]).done.items():
        assert (place.results(), place.errors()) == before[unit]


def test_a_log_is_read_while_it_grows(tmp_path: Path) -> None:
    path = tmp_path / "0001-00"
    reader = LogReader(path, check=False)
    assert list(reader.records()) == []
    log = Log(path)
    for unit in range(3):
        log.done(unit, 1, 0, 0, b"x" * 100, b"")
        assert [record.unit for record, _ in reader.records()] == [unit]
    assert list(reader.records()) == []


def test_two_runs_that_finished_one_unit_count_once(tmp_path: Path) -> None:
    for run in (1, 2):
        log = Log(tmp_path / f"000{run}-00")
        log.done(7, 1, 0, 0, f"run {run}".encode(), b"")
    state = read_state(sorted(tmp_path.iterdir()))
    assert state.done[7].results() == b"run 1"


def test_crashes_are_counted_until_they_have_been_looked_at(tmp_path: Path) -> None:
    for run in range(CRASHES):
        assert read_state(sorted(tmp_path.iterdir())).suspects() == []
        Log(tmp_path / f"000{run}-00").begin(4)
    left = Log(tmp_path / "0003-00")  # left on purpose: no crash
    left.begin(5)
    left.leave(5)
    assert read_state(sorted(tmp_path.iterdir())).suspects() == [4]
    Log(tmp_path / "0004-00").judge(Judged(4, {12: "was ended by SIGSEGV"}))
    state = read_state(sorted(tmp_path.iterdir()))
    assert (state.suspects(), state.apart, state.banned(4)) == ([], set(), {12: "was ended by SIGSEGV"})
    for run in range(5, 5 + CRASHES):  # killed from outside, it may be: looked at again, and nobody is blamed
        Log(tmp_path / f"000{run}-00").begin(4)
    state = read_state(sorted(tmp_path.iterdir()))
    assert (state.suspects(), state.apart, state.banned(4)) == ([4], set(), {12: "was ended by SIGSEGV"})


@pytest.mark.parametrize("unclear", [True, False])
def test_rows_that_could_not_be_tried_are_computed_one_by_one_and_then_left_out(tmp_path: Path, unclear: bool) -> None:
    for run in range(CRASHES):
        Log(tmp_path / f"000{run}-00").begin(4)
    Log(tmp_path / "0003-00").judge(Judged(4, None if unclear else {}, apart=True))
    assert read_state(sorted(tmp_path.iterdir())).apart == {4}
    for run in range(4, 4 + CRASHES):
        log = Log(tmp_path / f"000{run}-00")
        log.begin(4)
        log.begin(4, 30)
        log.leave(4, 30)
        log.begin(4, 31)
    state = read_state(sorted(tmp_path.iterdir()))
    assert (state.apart, state.suspects()) == ({4}, [])
    assert list(state.banned(4)) == ([31] if unclear else [])  # one that did no harm alone was killed from outside


def test_a_log_belongs_to_one_run(tmp_path: Path) -> None:
    Log(tmp_path / "0001-00")
    with pytest.raises(JobError, match="File exists"):
        Log(tmp_path / "0001-00")
