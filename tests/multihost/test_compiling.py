"""Programs that all processes of a job need: compiled once a process, found at the second start, whatever the cache."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.multihost.processes import Ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import collections, sys, time
import numpy as np
import spmd_infer as si
from jax import monitoring

events = collections.Counter()
monitoring.register_event_listener(lambda name, **_: events.update([name.rsplit("/", 1)[1]]))
with si.initialize(quiet=True) as job:
    import jax

    events.clear()
    engine = si.Engine.load("tests/fixtures/digits_cnn", mesh="data=2")
    out = engine.infer({"image": np.ones((5, 32, 32, 1), np.float32)})
    np.save(f"{sys.argv[1]}/scores{job.rank}.npy", jax.tree.leaves(out)[0])
    print("asked", events["compile_requests_use_cache"], "found", events["cache_hits"])
"""

TURN = """
import time
import numpy as np
import spmd_infer as si

with si.initialize(quiet=True) as job:
    import jax
    from spmd_infer.errors import ClusterError
    from spmd_infer.multihost.compiling import in_turn

    class Slow:
        def __init__(self, text):
            self.text = text
        def as_text(self):
            return self.text
        def compile(self):
            begin = time.time()
            time.sleep(2 if job.rank == 0 else 0)
            return begin, time.time()

    begin, end = in_turn(job, Slow("module"), "slow 1")
    print("compiled", begin, end)
    try:
        in_turn(job, Slow(f"module {job.rank}"), "other 2")
    except ClusterError as error:
        print(error)
"""


def start(folder: Path, cache: Path) -> tuple[list[tuple[int, int]], np.ndarray, str]:
    """For each rank how many programs it asked the cache for, and found; results; warnings."""
    with Ranks(PROGRAM, 2, folder, str(folder), SPMD_INFER_COMPILE_CACHE=str(cache)) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(0)
        counts = [re.search(r"asked (\d+) found (\d+)", ranks.out(rank)) for rank in range(2)]
        said = ranks.err(0) + ranks.err(1)
    assert all(counts)
    return [(int(m[1]), int(m[2])) for m in counts if m], np.load(folder / "scores1.npy"), said


def test_a_second_start_compiles_nothing_and_a_corrupt_cache_costs_only_time(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, scores, _ = start(tmp_path, cache)
    assert all(found == 0 < asked for asked, found in first)
    second, again, said = start(tmp_path, cache)
    print(f"\nprograms (asked, found) by rank: first start {first}, second {second}")
    assert all(found == asked for asked, found in second)
    np.testing.assert_array_equal(scores, again)
    for entry in cache.glob("*-cache"):
        entry.write_bytes(b"\x00" * 100)
    third, again, said = start(tmp_path, cache)
    assert all(found == 0 for _, found in third)
    assert "Error reading persistent compilation cache entry" in said
    np.testing.assert_array_equal(scores, again)


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    counts, scores, said = start(tmp_path, file / "below")
    assert "no compile cache" in said
    assert all(found == 0 for _, found in counts)
    assert np.isfinite(scores).all()


def test_a_cache_that_is_not_shared_is_said(tmp_path: Path) -> None:
    each = {1: {"SPMD_INFER_COMPILE_CACHE": str(tmp_path / "b")}}
    env = {"SPMD_INFER_COMPILE_CACHE": str(tmp_path / "a")}
    with Ranks(PROGRAM, 2, tmp_path, str(tmp_path), each=each, **env) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(1)
        assert "rank 1 does not see what rank 0 writes in the compile cache" in ranks.err(1)
        assert "compile cache" not in ranks.err(0)


def test_others_wait_until_rank_0_has_compiled(tmp_path: Path) -> None:
    with Ranks(TURN, 2, tmp_path, SPMD_INFER_COMPILE_CACHE="off") as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(0) + ranks.err(1)
        (_, end), (begin, _) = (
            map(float, re.search(r"compiled (\S+) (\S+)", ranks.out(rank)).groups())  # type: ignore[union-attr]
            for rank in range(2)
        )
        assert begin >= end - 0.05
        assert re.search(r"rank 0 \(.*\) and rank 1 \(.*\) differ in program other: lowered modules", ranks.out(1))
