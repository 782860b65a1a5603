"""Ranks that save together when one of them is killed or its disk is full (FAULTS 12 and 13), and that drain (14)."""

import random
import signal
import time
from pathlib import Path

import pytest

from spmd_infer.checkpoints import open_checkpoint, verify
from tests.faults.test_multihost import report
from tests.multihost.processes import Ranks
from tests.multihost.test_engine import llama

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# argv: a folder. Saves to one new name after the other, and at last to one that an earlier run may have begun.
SAVE = """
import sys
from pathlib import Path
import numpy as np
import spmd_infer as si

folder, rounds, full = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "full"
with si.initialize(quiet=True) as job:
    weights = {f"w{n}": np.random.default_rng(n).normal(size=(256, 512)).astype(np.float32) for n in range(6)}
    engine = si.Engine(lambda p, x: x @ p["w0"], weights, mesh="model=4", example=np.ones((2, 256), np.float32))
    if full and job.rank == 1:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))  # as a full disk: writing fails in the middle
    print("begin", flush=True)
    for number in range(rounds):
        try:
            engine.save(folder / f"saved{number}", overwrite=True)
        except si.SpmdInferError as error:
            print("refused:", error, flush=True)
    print("end", flush=True)
"""
KILLS = 3

DRAIN = """
import sys
import numpy as np
import spmd_infer as si

with si.initialize(quiet=True) as job:
    engine = si.Engine.load(sys.argv[1], mesh="data=2,model=2", dtype="float32")
    prompts = np.random.default_rng(1).integers(5, 90, (32, 12)).tolist()
    params = si.SamplingParams(max_tokens=60, min_tokens=60)
    told = set()
    def on_text(index, text):
        told.add(index)
        if len(told) == 32:
            print("streaming", flush=True)
    rounds = 0
    while not job.should_stop():
        found = engine.generate(prompts, params, on_text=on_text)
        assert [len(each.token_ids) for each in found] == [60] * 32
        rounds += 1
    print("finished", rounds)
"""


def saved(folder: Path) -> list[Path]:
    """What stands there under its final name; each of it must be whole."""
    found = sorted(path for path in folder.iterdir() if path.name.startswith("saved"))
    for path in found:
        assert verify(open_checkpoint(path)) == [], path
    return found


def test_a_rank_killed_while_all_save_leaves_nothing_half_written(tmp_path: Path) -> None:
    folder, chance = tmp_path / "out", random.Random(7)
    folder.mkdir()
    for kill in range(KILLS):
        with Ranks(SAVE, 2, tmp_path, str(folder), "100000", "-", devices=2) as ranks:
            ranks.until("begin")
            two = time.monotonic() + 60
            while not (folder / "saved1").exists():
                assert time.monotonic() < two
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.5))
            ranks.popen[kill % 2].kill()
            begin = time.monotonic()
            ranks.wait(40)
            report(f"kill -9 of rank {kill % 2} while saving", ranks.last() - begin, 15)
        before = len(saved(folder))
        assert before > 1
    with Ranks(SAVE, 2, tmp_path, str(folder), str(before + 2), "-", devices=2) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(0)
        assert "refused" not in ranks.out(0)
    assert len(saved(folder)) >= before + 2


def test_a_full_disk_on_one_rank_is_said_by_all_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for full in ("-", "full"):
        with Ranks(SAVE, 2, tmp_path, str(folder), "1", full, devices=2) as ranks:
            assert set(ranks.wait(120).values()) == {0}, ranks.err(0)
            said = [ranks.out(rank) for rank in range(2)]
        (path,) = saved(folder)
        assert path.name == "saved0"
    assert all("refused: " in each and "process 1: " in each and "File too large" in each for each in said), said
    assert list(folder.iterdir()) == [path]


def test_sigterm_with_32_open_streams(tmp_path: Path) -> None:
    with Ranks(DRAIN, 2, tmp_path, str(llama(tmp_path / "llama")), devices=2) as ranks:
        ranks.until("streaming")
        begin = time.monotonic()
        ranks.popen[1].send_signal(signal.SIGTERM)
        codes = ranks.wait(60)
        report("SIGTERM with 32 open streams, all drained", ranks.last() - begin, 30)
        assert set(codes.values()) == {0}
        assert len({ranks.out(rank).split("finished")[1] for rank in codes}) == 1
