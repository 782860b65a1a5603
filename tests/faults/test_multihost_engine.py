"""A rank that stops where nobody has set a deadline: the watchdog is armed from the start, by the engine (FAULTS 4)."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults.test_multihost import report
from tests.multihost.processes import Ranks, clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

HOST = socket.gethostname()

# argv: where rank 2 goes to sleep. No step of the program's own.
PROGRAM = """
import sys, time
import numpy as np
import spmd_infer as si

where = sys.argv[1]

def sleep(here):
    if where == here and job.rank == 2:
        print("sleeps", flush=True)
        time.sleep(1000)

with si.initialize(quiet=True) as job:
    import jax
    engine = si.Engine.load("tests/fixtures/digits_cnn", mesh="data=1,model=4")
    images = np.ones((4, 32, 32, 1), np.float32)
    engine.infer({"image": images})
    sleep("between calls")
    results = engine.infer_stream({"image": images} for _ in range(10))
    next(results)
    sleep("in a stream")
    list(results)
"""

# The device runtime of rank 1 does not come up.
STUCK_START = """
import os, time
from spmd_infer import initialize
import jax

if os.environ["SPMD_INFER_PROCESS_ID"] == "1":
    jax.devices = lambda *_: time.sleep(1000)
print("joins", flush=True)
initialize(quiet=True)
"""

# Rank 1 does not come to initialize(), as where a file system hangs under its imports.
STUCK_IMPORT = """
import os, time
os.environ["SPMD_INFER_PROCESS_ID"] == "1" and time.sleep(1000)
from spmd_infer import initialize
print("joins", time.time(), flush=True)
initialize(quiet=True)
"""


@pytest.mark.parametrize("where", ["between calls", "in a stream"])
def test_a_rank_that_does_not_come_to_the_next_call(where: str, tmp_path: Path) -> None:
    limit = 5
    with Ranks(PROGRAM, 4, tmp_path, where, SPMD_INFER_STEP=str(limit)) as ranks:
        ranks.until("sleeps", [2])
        begin = time.monotonic()
        codes = ranks.wait(limit + 30)
        report(f"rank 2 sleeps {where}, deadline of the engine {limit} s", ranks.last() - begin, limit + 10)
        assert all(code != 0 for code in codes.values())
        for rank in (0, 1, 3):
            said = ranks.err(rank)
            assert f"the job ends: rank 2 ({HOST}, pid {ranks.pid(2)}) is stuck at " in said, said
            assert re.search(r"in sleep, in step \d+ while others are in \d+", said), said


def test_a_rank_whose_devices_do_not_start(tmp_path: Path) -> None:
    limit = 6  # three times as long for JAX to start
    with Ranks(STUCK_START, 3, tmp_path, SPMD_INFER_INIT_TIMEOUT=str(limit)) as ranks:
        ranks.until("joins")
        begin = time.monotonic()
        codes = ranks.wait(60)
        report("devices of rank 1 do not start", ranks.last() - begin, 3 * limit + 10)
        assert all(code != 0 for code in codes.values())
        for rank in (0, 2):
            assert f"the job ends: rank 1 ({HOST}, pid {ranks.pid(1)}) is stuck at " in ranks.err(rank), ranks.err(rank)


def test_a_rank_that_hangs_before_it_joins_is_named_and_ended_by_the_launcher() -> None:
    limit = 8
    done = subprocess.run(
        [str(Path(sys.executable).parent / "spmd-infer"), "launch", "--nprocs", "3", "--", sys.executable, "-c",
         STUCK_IMPORT],
        env=clean_environment(SPMD_INFER_INIT_TIMEOUT=str(limit)),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    ended = time.time()
    assert done.returncode == 1
    assert "ClusterError: 2 of 3 processes came within 8 s; missing: rank 1" in done.stderr
    joined = max(float(moment) for moment in re.findall(r"joins ([0-9.]+)", done.stdout))
    # The launcher leaves the others 6 s to end by themselves, and 3 more after SIGTERM.
    report("rank 1 hangs before it joins, time-out 8 s, launcher and all", ended - joined, limit + 6 + 3 + 3)
