"""Ranks that hold different programs, configurations or checkpoints are refused before the first step (FAULTS 5)."""

import os
import re
import shutil
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import sys, time
import numpy as np
import spmd_infer as si

what, other = sys.argv[1:3]
with si.initialize(quiet=True) as job:
    odd = job.rank == 1
    folder = other if what == "checkpoint" and odd else "tests/fixtures/digits_cnn"
    buckets = [16] if what == "buckets" and odd else None
    if what == "program":
        weight = {"w": np.ones((4, 4), np.float32)}
        fn = (lambda p, x: x @ p["w"] + 1) if odd else (lambda p, x: x @ p["w"])
        engine = si.Engine(fn, weight, mesh="data=3", example=np.ones((3, 4), np.float32))
        job.channel.gather("ready", b"")
        print("begin", time.time(), flush=True)
        engine.infer(np.ones((3, 4), np.float32))
    else:
        import spmd_infer.engine, spmd_infer.checkpoints  # seconds on a busy machine, and no part of refusing
        job.channel.gather("ready", b"")
        print("begin", time.time(), flush=True)
        si.Engine.load(folder, mesh="data=3", buckets=buckets)
    print("not refused")
"""

CASES = {
    "checkpoint": ("", r"differ in the engine, (checkpoint|configuration): "),
    "buckets": ("", r"differ in the engine, buckets: \(3, .*\) and \(18,\)"),
    "program": ("", r"differ in program infer, (instructions|HLO): "),
    "environment": ("JAX_DEFAULT_MATMUL_PRECISION", r"differ in the engine, variable JAX_DEFAULT_MATMUL_PRECISION: "),
}


@pytest.mark.parametrize("what", CASES)
def test_refused_before_the_first_step(what: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree("tests/fixtures/digits_cnn", other)
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # one bit of one weight
    weights.write_bytes(content)
    variable, message = CASES[what]
    each = {1: {variable: "highest"}} if variable else {}
    with Ranks(PROGRAM, 3, tmp_path, what, str(other), each=each) as ranks:
        ranks.until("begin")
        codes = ranks.wait(60)
        # By the clock that the ranks printed: the wait above may have noticed late.
        seconds = max(float(Path(ranks.file(rank, "err")).stat().st_mtime) for rank in codes) - max(
            float(re.search(r"begin ([0-9.]+)", ranks.out(rank))[1])
            for rank in codes  # type: ignore[index]
        )
        print(f"\n{what} differs: refused after {seconds:.1f} s (at most 5 s), load {os.getloadavg()[0]:.1f}")
        assert all(code != 0 for code in codes.values())
        assert all("not refused" not in ranks.out(rank) for rank in codes)
        said = "".join(ranks.err(rank) for rank in codes)
        names = [rf"rank {rank} \(\S+, pid {ranks.pid(rank)}\)" for rank in (0, 1)]
        assert re.search(rf"{names[0]} and {names[1]} {message}", said), said
        assert seconds <= 5
