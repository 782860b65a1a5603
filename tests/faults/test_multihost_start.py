"""Jobs that cannot start: every process ends within the time-out, and is told what is missing or wrong (FAULTS 23)."""

import os
import re
import secrets
import socket
import time
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import time
from spmd_infer import initialize

print("joins", time.time(), flush=True)
initialize(quiet=True)
print("started")
"""
HOST = socket.gethostname()


def ends(ranks: Ranks, limit: float, what: str) -> str:
    """All processes fail in time, counted from when the last of them joins; what they say, in order."""
    codes = ranks.wait(limit + 40)
    joined = [float(said[1]) for rank in codes if (said := re.search(r"joins ([0-9.]+)", ranks.out(rank)))]
    seconds = ranks.last() - time.monotonic() + time.time() - max(joined)
    print(f"\n{what}: {seconds:.1f} s (at most {limit:.0f} s), load {os.getloadavg()[0]:.1f}")
    assert seconds <= limit
    assert set(codes.values()) == {1}
    assert all("started" not in ranks.out(rank) for rank in codes)
    return "\n".join(ranks.err(rank) for rank in sorted(codes))


def test_one_process_never_starts(tmp_path: Path) -> None:
    with Ranks(PROGRAM, 4, tmp_path, start=(0, 1, 3), SPMD_INFER_INIT_TIMEOUT="15") as ranks:
        said = ends(ranks, 15 + 5, "rank 2 of 4 never starts, time-out 15 s")
        for rank in (0, 1, 3):
            assert "ClusterError: 3 of 4 processes came within 15 s; missing: rank 2" in ranks.err(rank)
        assert re.search(r"\[spmd-infer rank 0\] waiting for 1 of 4 processes: rank 2; \d+ s left", said)


def test_rank_0_never_starts(tmp_path: Path) -> None:
    with Ranks(PROGRAM, 3, tmp_path, start=(1, 2), SPMD_INFER_INIT_TIMEOUT="6") as ranks:
        said = ends(ranks, 6 + 5, "rank 0 never starts, time-out 6 s")
        assert "rank 1 did not reach the coordinator at 127.0.0.1:" in said
        assert "rank 0 did not start, or its port is blocked; see SPMD_INFER_COORDINATOR" in said


def test_the_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        address = f"127.0.0.1:{port}"
        with Ranks(PROGRAM, 2, tmp_path, SPMD_INFER_COORDINATOR=address, SPMD_INFER_INIT_TIMEOUT="8") as ranks:
            ends(ranks, 8 + 10, "port taken, time-out 8 s")  # and 5 s for a greeting that never comes
            assert f"rank 0 cannot listen at {address}: the port is taken" in ranks.err(0)
            assert "SPMD_INFER_COORDINATOR=host:port" in ranks.err(0)
            assert "what answers there is no coordinator of spmd-infer" in ranks.err(1)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ({2: {"SPMD_INFER_NUM_PROCESSES": "4"}}, "was told that the job has 4 processes, rank 0 that it has 3; see"),
        ({2: {"SPMD_INFER_PROCESS_ID": "1"}}, "two processes say they are rank 1: rank 1 ("),
    ],
    ids=["another count", "one rank twice"],
)  # fmt: skip
def test_processes_that_were_told_different_things(
    each: dict[int, dict[str, str]], message: str, tmp_path: Path
) -> None:
    with Ranks(PROGRAM, 3, tmp_path, each=each) as ranks:
        ends(ranks, 60, message)
        for rank in range(3):
            assert message in ranks.err(rank)


def test_another_secret_is_refused_and_its_origin_named(tmp_path: Path) -> None:
    each = {1: {"SPMD_INFER_JOB_SECRET": secrets.token_hex(16)}}
    with Ranks(PROGRAM, 2, tmp_path, each=each, SPMD_INFER_INIT_TIMEOUT="8") as ranks:
        ends(ranks, 8 + 5, "another job secret, time-out 8 s")
        assert "hold different job secrets, or it ended; set the same SPMD_INFER_JOB_SECRET" in ranks.err(1)
        assert "missing: rank 1; connections with another job secret came from 127.0.0.1" in ranks.err(0)


def test_no_address_of_this_host(tmp_path: Path) -> None:
    address = f"192.0.2.77:{free_port()}"  # an address for documentation, which no host has
    with Ranks(PROGRAM, 2, tmp_path, start=(0,), SPMD_INFER_COORDINATOR=address) as ranks:
        ends(ranks, 30, "not an address of rank 0's host")
        assert "rank 0 cannot listen on 192.0.2.77" in ranks.err(0)
        assert "SPMD_INFER_COORDINATOR" in ranks.err(0)


def test_a_rank_that_fails_before_all_have_come(tmp_path: Path) -> None:
    failing = PROGRAM.replace("initialize(q", "import os; os.environ['RANK'] == '1' and 1 / 0; initialize(q")
    with Ranks(failing, 2, tmp_path, each={0: {"RANK": "0"}, 1: {"RANK": "1"}}, SPMD_INFER_INIT_TIMEOUT="8") as ranks:
        ends(ranks, 8 + 5, "rank 1 fails before it joins, time-out 8 s")
        assert "missing: rank 1" in ranks.err(0)


def test_a_rank_killed_while_others_are_awaited(tmp_path: Path) -> None:
    with Ranks(PROGRAM, 3, tmp_path, start=(0, 1), SPMD_INFER_INIT_TIMEOUT="60") as ranks:
        deadline = time.monotonic() + 50
        while "waiting for 1 of 3" not in ranks.err(0):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ranks.popen[1].kill()
        begin = time.monotonic()
        ranks.wait(30)
        print(f"\nkilled in start-up: {ranks.last() - begin:.1f} s")
        assert ranks.last() - begin <= 15
        assert f"rank 1 ({HOST}, pid {ranks.pid(1)}) died: killed" in ranks.err(0)
