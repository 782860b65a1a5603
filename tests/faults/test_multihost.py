"""What happens to a job when one of its ranks fails: all end in time, and the message names it (FAULTS 1–4)."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd_infer.multihost.exit_codes import OTHER_FAILED, REQUEUE, TERMINATED
from tests.multihost.processes import Ranks, clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOST = socket.gethostname()

# Every rank adds up an array that lies on all devices, again and again. argv: what goes wrong on rank 2, and how.
PROGRAM = """
import ctypes, os, sys, time
import spmd_infer as si

fault, deadline = sys.argv[1], float(sys.argv[2])
with si.initialize(quiet=True) as job:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    ones = np.ones((jax.device_count(), 1024), np.float32)
    x = jax.make_array_from_callback(ones.shape, split, lambda index: ones[index])
    add = jax.jit(lambda x: x.sum(), out_shardings=whole)
    add(x).block_until_ready()
    for number in range(10**9):
        with job.step("add", deadline):
            if number == 5:
                print("running")
            if number > 5 and job.rank == 2:
                if fault == "raise":
                    raise KeyError("no such thing")
                if fault == "sleep":
                    time.sleep(1000)
                if fault == "loop":
                    while True:
                        pass
                if fault == "hold":  # a call in C that keeps the interpreter to itself
                    ctypes.PyDLL(None).sleep(1000)
                if fault == "exit":
                    sys.exit(9)
            assert float(add(x)) == 1024 * jax.device_count()
        if fault == "no points":
            continue
        if fault == "hard end" and job.stopping:
            time.sleep(1000)
        if job.should_stop():
            print("stopped after", number)
            if fault == "requeue":
                job.requeue()
            break
        time.sleep(0.01 * job.rank)
"""


def job(folder: Path, fault: str, deadline: float = 60.0, **env: str) -> Ranks:
    return Ranks(PROGRAM, 4, folder, fault, str(deadline), **env)


def report(name: str, seconds: float, limit: float) -> None:
    print(f"\n{name}: {seconds:.2f} s (at most {limit:.0f} s), load {os.getloadavg()[0]:.1f}")
    assert seconds <= limit


@pytest.mark.parametrize(("victim", "limit"), [(3, 15.0), (0, 5.0)])
def test_killed(victim: int, limit: float, tmp_path: Path) -> None:
    with job(tmp_path, "nothing") as ranks:
        ranks.until("running")
        begin = time.monotonic()
        ranks.popen[victim].kill()
        codes = ranks.wait(limit + 10)
        report(f"kill -9 of rank {victim}", ranks.last() - begin, limit)
        assert codes.pop(victim) == -signal.SIGKILL
        assert all(code != 0 for code in codes.values())
        name = f"{'coordinator ' if victim == 0 else ''}rank {victim} ({HOST}, pid {ranks.pid(victim)})"
        deadline = time.monotonic() + 5
        for rank in codes:  # a guard may speak for its rank a moment after that has been aborted
            while "the job ends" not in ranks.err(rank) and time.monotonic() < deadline:
                time.sleep(0.05)
            assert f"[spmd-infer rank {rank}] the job ends: {name} died: killed" in ranks.err(rank), ranks.err(rank)
            assert ranks.err(rank).count("the job ends") == 1


def test_exception_on_one_rank(tmp_path: Path) -> None:
    with job(tmp_path, "raise") as ranks:
        ranks.until("running")
        begin = time.monotonic()
        codes = ranks.wait(30)
        report("exception on rank 2", ranks.last() - begin, 10.0)
        assert codes == {0: OTHER_FAILED, 1: OTHER_FAILED, 2: 1, 3: OTHER_FAILED}
        shown = ranks.err(2)
        assert shown.count("Traceback (most recent call last)") == 1
        assert shown.endswith("KeyError: 'no such thing'\n")
        for rank in (0, 1, 3):
            name = f"rank 2 ({HOST}, pid {ranks.pid(2)})"
            assert f"[spmd-infer rank {rank}] the job ends: {name} raised KeyError: 'no such th" in ranks.err(rank)
            assert "Traceback" not in ranks.err(rank)


def test_the_launcher_shows_the_traceback_last(tmp_path: Path) -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [str(Path(sys.executable).parent / "spmd-infer"), "launch", "--nprocs", "4", "--devices-per-process", "1",
         "--", sys.executable, "-c", PROGRAM, "raise", "60"],
        env=clean_environment(), capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert done.stderr.endswith("[2] KeyError: 'no such thing'\n")
    assert "[launch] rank 2 (pid " in done.stderr
    print(f"\nfrom start to end: {time.monotonic() - begin:.1f} s")


def test_exit_with_a_code(tmp_path: Path) -> None:
    with job(tmp_path, "exit") as ranks:
        ranks.until("running")
        begin = time.monotonic()
        codes = ranks.wait(30)
        report("sys.exit(9) on rank 2", ranks.last() - begin, 10.0)
        assert codes == {0: OTHER_FAILED, 1: OTHER_FAILED, 2: 9, 3: OTHER_FAILED}
        assert f"rank 2 ({HOST}, pid {ranks.pid(2)}) ended with exit code 9" in ranks.err(0)


@pytest.mark.parametrize("fault", ["stop", "sleep", "loop", "hold"])
def test_alive_but_stuck(fault: str, tmp_path: Path) -> None:
    deadline = 6.0
    with job(tmp_path, fault, deadline) as ranks:
        ranks.until("running")
        begin = time.monotonic()
        if fault == "stop":
            ranks.popen[2].send_signal(signal.SIGSTOP)
        codes = ranks.wait(deadline + 30)
        report(f"rank 2 stuck ({fault}), step deadline {deadline:.0f} s", ranks.last() - begin, deadline + 10)
        assert all(code != 0 for code in codes.values())
        how = {"stop": "is stopped by a signal", "hold": "does not run: stuck in a call that holds"}.get(
            fault, "is stuck at"
        )
        for rank in range(4):
            assert f"the job ends: rank 2 ({HOST}, pid {ranks.pid(2)}) {how}" in ranks.err(rank), ranks.err(rank)
            if (rank, fault) != (2, "stop"):  # nothing makes a stopped process say where it is
                assert re.search(r"thread 0x[0-9a-f]+ .*most recent call first", ranks.err(rank), re.IGNORECASE)
        assert "ran past its 6 s" in ranks.err(0)


def test_stopped_and_continued_within_its_time(tmp_path: Path) -> None:
    with job(tmp_path, "nothing", 60) as ranks:
        ranks.until("running")
        ranks.popen[2].send_signal(signal.SIGSTOP)
        time.sleep(12)  # longer than the heartbeat, which the guards send
        ranks.popen[2].send_signal(signal.SIGCONT)
        ranks.popen[1].send_signal(signal.SIGTERM)
        assert set(ranks.wait(40).values()) == {0}


@pytest.mark.parametrize(("fault", "code"), [("nothing", 0), ("requeue", REQUEUE)])
def test_sigterm_to_one_rank_stops_all_after_the_same_step(fault: str, code: int, tmp_path: Path) -> None:
    with job(tmp_path, fault) as ranks:
        ranks.until("running")
        begin = time.monotonic()
        ranks.popen[1].send_signal(signal.SIGTERM)
        codes = ranks.wait(30)
        report("SIGTERM to rank 1, all drained", ranks.last() - begin, 30.0)
        assert set(codes.values()) == {code}
        assert len({ranks.out(rank).split("stopped after")[1] for rank in range(4)}) == 1


def test_sigterm_where_the_program_cannot_stop(tmp_path: Path) -> None:
    with job(tmp_path, "no points") as ranks:
        ranks.until("running")
        begin = time.monotonic()
        ranks.popen[1].send_signal(signal.SIGTERM)
        codes = ranks.wait(30)
        report("SIGTERM, no point to stop at", ranks.last() - begin, 10.0)
        assert codes == {0: OTHER_FAILED, 1: TERMINATED, 2: OTHER_FAILED, 3: OTHER_FAILED}
        assert f"rank 1 ({HOST}, pid {ranks.pid(1)}) was ended by SIGTERM" in ranks.err(0)


def test_a_second_sigterm_ends_at_once(tmp_path: Path) -> None:
    with job(tmp_path, "hard end") as ranks:
        ranks.until("running")
        ranks.popen[1].send_signal(signal.SIGTERM)
        time.sleep(1)
        begin = time.monotonic()
        ranks.popen[1].send_signal(signal.SIGTERM)
        codes = ranks.wait(20)
        report("second SIGTERM", ranks.ended[1] - begin, 2.0)
        assert codes[1] == TERMINATED
