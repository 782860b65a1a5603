"""Offline jobs that are killed, told to stop, poisoned or started twice (FAULTS 6, 26, 27)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spmd_infer.jobs.folder import JobFolder
from spmd_infer.jobs.log import LogReader
from spmd_infer.multihost.exit_codes import REQUEUE
from tests.jobs.packaged_task import install_shout
from tests.multihost import test_schedulers as schedulers
from tests.multihost.processes import Ranks, clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DIGITS = str(Path("tests/fixtures/digits_cnn").absolute())
MAIN = "from spmd_infer.cli import main; main()"
END_S = 240.0
OTHERS_END_S = 10.0
UNITS_BEFORE_A_KILL = 4
"""Units that a slow machine may finish between one of them and the kill that was to come then."""


class Batch(Ranks):
    """``spmd-infer batch`` on several processes."""

    def __init__(self, folder: Path, size: int, arguments: list[str], env: Mapping[str, str]) -> None:
        folder.mkdir(parents=True)
        super().__init__(MAIN, size, folder, "batch", *arguments, **env)
        self.began = time.monotonic()

    def kill(self) -> None:
        """Kill a rank. The others end by themselves; those that still wait for it to come are killed, as srun would."""
        rank = random.choice(list(self.popen))
        self.popen[rank].kill()
        deadline = time.monotonic() + OTHERS_END_S
        while time.monotonic() < deadline and any(process.poll() is None for process in self.popen.values()):
            time.sleep(0.02)
        for process in self.popen.values():
            process.kill()
        self.wait(30)

    def until_done(self, output: Path, units: int) -> None:
        """Wait until so many units are done, in all runs so far."""
        deadline = time.monotonic() + END_S
        while len(done_units(output)) < units:
            assert time.monotonic() < deadline, self.err(0)
            assert all(process.poll() is None for process in self.popen.values()), self.err(0)
            time.sleep(0.02)

    def finished_or(self, seconds: float) -> bool:
        """Whether all end well within so many seconds."""
        while time.monotonic() < self.began + seconds:
            if all(process.poll() is not None for process in self.popen.values()):
                return set(self.wait(1).values()) == {0}
            time.sleep(0.01)
        return False


def done_units(output: Path) -> set[int]:
    """Units that any run has finished."""
    folder = JobFolder(output)
    if not (folder.path / "logs").is_dir():
        return set()
    readers = [LogReader(path) for path in folder.logs()]
    return {place.done.unit for reader in readers for _, place in reader.records() if place is not None}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, name: str, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({name: text, "id": f"row-{n}"}) + "\n" for n, text in enumerate(texts)))


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """The task ``shout``, and a compile cache of its own."""
    cache, packages = tmp_path / "xla", tmp_path / "packages"
    cache.mkdir(mode=0o700)
    packages.mkdir()
    install_shout(packages)
    path = os.pathsep.join([str(packages), str(Path.cwd())])
    return {"PYTHONPATH": path, "SPMD_INFER_COMPILE_CACHE": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}


def run_one(arguments: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """``spmd-infer batch`` on one process, to its end."""
    command = [sys.executable, "-c", MAIN, "batch", *arguments]
    return subprocess.run(command, env=clean_environment(**env), capture_output=True, text=True, timeout=END_S)


def kill_at_random(
    folder: Path, arguments: list[str], env: Mapping[str, str], output: Path, kills: int, units: int
) -> None:
    """Start a job on four processes again and again, and kill one of them each time.

    Half of the kills come at a random moment of the start, the others once a random number of further units is done;
    a fifth of the units is left for the end. On a machine that is slow to kill, where units become scarce, the other
    kills all come at the start.
    """
    startup = 0.0
    for number in range(kills):
        before = len(done_units(output))
        goal = before + random.randint(1, max(1, int(0.8 * units - before) // (kills - number)))
        with Batch(folder / f"run{number}", 4, arguments, env) as batch:
            scarce = units - before <= kills - number + UNITS_BEFORE_A_KILL
            if startup and (scarce or random.random() < 0.5):
                assert not batch.finished_or(random.uniform(0.2, startup)), "the job was done before it was killed"
            else:
                batch.until_done(output, before + 1)
                seconds = time.monotonic() - batch.began
                startup = min(startup or seconds, seconds)
                batch.until_done(output, goal)
                time.sleep(random.uniform(0, 0.1))
            batch.kill()


@pytest.mark.demo
@pytest.mark.parametrize(("model", "kills"), [("minilm", 13), ("smollm2", 7)])
def test_killed_at_random_points(
    model: str,
    kills: int,
    minilm: Path,
    smollm2: Path,
    sts_b_test: list[tuple[float, str, str]],
    human_eval: list[str],
    tmp_path: Path,
    env: dict[str, str],
) -> None:
    """2,000 sentences of STS-B and 200 prompts, twenty kills in all: complete, exact."""
    seed = random.randrange(10**6)
    random.seed(seed)
    source = tmp_path / "in.jsonl"
    if model == "minilm":
        sentences = [text for _, *pair in sts_b_test for text in pair][:2000]
        write_rows(source, "text", sentences)
        arguments = [str(minilm), str(source), "--dtype", "float32", "--unit-cost", "800"]
    else:
        prompts = [f"{number}. {human_eval[number % 164][:40]}" for number in range(200)]
        write_rows(source, "prompt", prompts)
        arguments = [str(smollm2), str(source), "--max-tokens", "2", "--unit-cost", "120"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    with Batch(tmp_path / "whole", 4, [*arguments[:2], str(whole), *arguments[2:]], env) as batch:
        assert set(batch.wait(END_S).values()) == {0}, batch.err(0)
        seconds = time.monotonic() - batch.began
    rows = lines(whole)
    assert [row["id"] for row in rows] == [f"row-{n}" for n in range(2000 if model == "minilm" else 200)]

    command = [*arguments[:2], str(output), *arguments[2:]]
    planned = json.loads(run_one([*command, "--dry-run", "--json"], env).stdout)
    begin = time.monotonic()
    kill_at_random(tmp_path / "killed", command, env, output, kills, planned["units"])
    with Batch(tmp_path / "last", 4, command, env) as batch:
        assert set(batch.wait(END_S).values()) == {0}, batch.err(0)
        last = batch.err(0)
    print(
        f"\n{model}: {len(rows)} rows in {planned['units']} units, {kills} kills (seed {seed}): 0 lost, 0 doubled; "
        f"unkilled {seconds:.1f} s, killed {time.monotonic() - begin:.1f} s\n{last}"
    )
    assert output.read_bytes() == whole.read_bytes()
    assert not JobFolder(output).errors.exists()


def test_goes_on_with_another_number_of_processes_after_sigterm(tmp_path: Path, env: dict[str, str]) -> None:
    source, output, whole = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    write_rows(source, "text", [f"text {n}" for n in range(1000)])
    arguments = ["--task", "shout", "--unit-cost", "200"]
    assert run_one([DIGITS, str(source), str(whole), *arguments], env).returncode == 0
    slow = env | {"SHOUT_S": "0.2"}
    for processes in (3, 2):
        before = len(done_units(output))
        with Batch(
            tmp_path / f"with{processes}", processes, [DIGITS, str(source), str(output), *arguments], slow
        ) as job:
            job.until_done(output, before + 4)
            begin = time.monotonic()
            job.popen[processes - 1].send_signal(signal.SIGTERM)
            codes = job.wait(30)
            print(f"\nSIGTERM to rank {processes - 1} of {processes}: all ended after {job.last() - begin:.1f} s")
            assert set(codes.values()) == {REQUEUE}, job.err(0)
        assert not output.exists()
    done = run_one([DIGITS, str(source), str(output), *arguments, "--json"], env)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["runs"] == 3
    assert output.read_bytes() == whole.read_bytes()


def test_a_row_that_crashes_the_process_is_left_out(tmp_path: Path, env: dict[str, str]) -> None:
    texts = [f"text {n}" for n in range(60)]
    texts[31], texts[47], texts[10] = "kill", "raise", "alone"  # the last only in company
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, "text", texts)
    arguments = [DIGITS, str(source), str(output), "--task", "shout", "--unit-cost", "250"]
    starts = 0
    while True:
        starts += 1
        with Batch(tmp_path / f"run{starts}", 2, arguments, env) as job:
            codes = set(job.wait(END_S).values())
            said = job.err(0)
        if codes == {0}:
            break
        assert starts < 8, said
    print(f"\nthree poison rows: done at start {starts}\n{said}")
    assert [row["id"] for row in lines(output)] == [f"row-{n}" for n in range(60) if n not in (31, 47)]
    assert all(row["shout"] == texts[row["row"]].upper() + "!" for row in lines(output))
    assert {row["together"] for row in lines(output) if 8 <= row["row"] <= 12} == {1}
    kill, raised = lines(JobFolder(output).errors)
    assert (kill["row"], kill["id"], kill["error"]["kind"]) == (31, "row-31", "Quarantined")
    assert "was ended by SIGKILL and then was ended by SIGKILL" in kill["error"]["message"]
    assert (raised["row"], raised["error"]["kind"]) == (47, "Quarantined")
    assert "raised RuntimeError: no such word" in raised["error"]["message"]


def test_the_same_job_started_twice(tmp_path: Path, env: dict[str, str]) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, "text", [f"text {n}" for n in range(2000)])  # minutes, were it not stopped
    arguments = [DIGITS, str(source), str(output), "--task", "shout", "--unit-cost", "200"]
    with Batch(tmp_path / "first", 2, arguments, env | {"SHOUT_S": "0.5"}) as first:
        first.until_done(output, 1)
        begin = time.monotonic()
        second = run_one(arguments, env)
        print(f"\nthe second start was refused after {time.monotonic() - begin:.1f} s")
        assert second.returncode == 8, second.stderr
        assert f"process {first.pid(0)} on " in second.stderr
        assert "Traceback" not in second.stderr
        first.popen[0].send_signal(signal.SIGTERM)
        assert set(first.wait(60).values()) == {REQUEUE}
    assert run_one(arguments, env).returncode == 0
    assert [row["row"] for row in lines(output)] == list(range(2000))


def test_one_mesh_over_all_processes(tmp_path: Path, env: dict[str, str]) -> None:
    from tests.jobs.test_run import pictures

    folder, one, both = pictures(tmp_path / "pictures", 40), tmp_path / "one.jsonl", tmp_path / "both.jsonl"
    (folder / "017.png").write_bytes(b"no picture")
    arguments = ["--unit-cost", str(6 * 1024)]
    assert run_one([DIGITS, str(folder), str(one), *arguments], env).returncode == 0
    command = [DIGITS, str(folder), str(both), *arguments, "--mesh", "data=1,model=2"]
    with Batch(tmp_path / "together", 2, command, env) as job:
        assert set(job.wait(END_S).values()) == {0}, job.err(0) + job.err(1)
    first, second = lines(one), lines(both)
    assert len(first) == 39
    assert [row["id"] for row in first] == [row["id"] for row in second]
    for row, other in zip(first, second, strict=True):
        assert [label["index"] for label in row["labels"]] == [label["index"] for label in other["labels"]]
        assert row["labels"][0]["score"] == pytest.approx(other["labels"][0]["score"], abs=1e-5)
    assert [row["id"] for row in lines(JobFolder(both).errors)] == ["017.png"]


slurm = schedulers.slurm


def test_under_slurm_a_crashing_row_costs_restarts_and_no_other_row(
    slurm: str, tmp_path: Path, env: dict[str, str]
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, "text", ["kill" if n == 31 else f"text {n}" for n in range(60)])
    arguments = [DIGITS, str(source), str(output), "--task", "shout", "--unit-cost", "250"]
    begin = time.monotonic()
    said = schedulers.submitted(slurm, tmp_path, [sys.executable, "-c", MAIN, "batch", *arguments], 4, END_S, **env)
    print(f"\nSLURM, two nodes: put back and finished after {time.monotonic() - begin:.0f} s")
    assert "after 1 restarts: put back into the queue" in said
    assert [row["row"] for row in lines(output)] == [n for n in range(60) if n != 31], said
    assert [row["row"] for row in lines(JobFolder(output).errors)] == [31]


def test_under_open_mpi(tmp_path: Path, env: dict[str, str]) -> None:
    schedulers.needed("mpirun", "scripts/ci-cluster install")
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, "text", [f"text {n}" for n in range(60)])
    arguments = [DIGITS, str(source), str(output), "--task", "shout", "--unit-cost", "250", "--json"]
    command = [schedulers.LAUNCH / "mpirun.sh", "--oversubscribe", "-n", "2", "--", sys.executable, "-c", MAIN]
    done = subprocess.run(
        [*map(str, command), "batch", *arguments],
        env=clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1", **env),
        capture_output=True, text=True, timeout=END_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count('"rows":60') == 1  # rank 0 alone speaks
    assert [row["row"] for row in lines(output)] == list(range(60))
