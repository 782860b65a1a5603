"""Real SLURM and real Open MPI on this machine, started by ``scripts/ci-cluster``.

Where they are not installed these tests are skipped, except in CI.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from spmd_infer.multihost.detection import detect
from spmd_infer.multihost.exit_codes import OTHER_FAILED
from spmd_infer.multihost.secret import job_secret
from tests.multihost.processes import clean_environment

LAUNCH = Path("scripts/launch").resolve()
ENDED_FOR = 4
"""Looks, half a second apart, at which a job must have ended."""

PROGRAM = """
import os, sys
from pathlib import Path
import spmd_infer as si

with si.initialize() as job:
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    marks = Path(sys.argv[2])
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    ones = np.ones((jax.device_count(), 8), np.float32)
    x = jax.make_array_from_callback(ones.shape, NamedSharding(mesh, PartitionSpec("x")), lambda index: ones[index])
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    first = int(marks.read_text()) if marks.exists() else 0
    for number in range(first, 10):
        with job.step("add", 30):
            total = float(add(x))
        if job.rank == 0:
            part = marks.with_suffix(".part")
            part.write_text(str(number + 1))
            part.rename(marks)
        if sys.argv[1] == "kill" and number == 5 and job.rank == 1 and first == 0:
            os.kill(os.getpid(), 9)
        if sys.argv[1] == "raise" and number == 5 and job.rank == 1:
            raise LookupError("on purpose")
    print(f"rank {job.rank} of {job.size}: {total:.0f} from step {first}", flush=True)
"""


def needed(program: str, hint: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI", "").lower() in ("", "0", "false"):
            pytest.skip(f"no {program}: {hint}")
        pytest.fail(f"CI must have {program}: {hint}")


@pytest.fixture(scope="session")
def slurm() -> str:
    """SLURM_CONF of a running cluster."""
    needed("sbatch", "scripts/ci-cluster install")
    if os.geteuid() != 0 and "SLURM_CONF" not in os.environ:
        pytest.skip("scripts/ci-cluster start needs root")
    done = subprocess.run(["scripts/ci-cluster", "start"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return re.search("SLURM_CONF=(.+)", done.stdout)[1]  # type: ignore[index]  # it prints it


def state_of(job: str, env: dict[str, str]) -> tuple[str, float]:
    """A job's state, and in how many seconds it may start."""
    shown = subprocess.run(["scontrol", "-o", "show", "job", job], env=env, capture_output=True, text=True, check=False)
    state = re.search(r"JobState=(\w+)", shown.stdout)
    eligible = re.search(r"EligibleTime=(\d\S+)", shown.stdout)
    begins = datetime.fromisoformat(eligible[1]).timestamp() - time.time() if eligible else 0.0
    return state[1] if state else "?", begins


def sbatch(conf: str, folder: Path, fault: str, restarts: int, seconds: float) -> str:
    """Submit the program, wait until the job has left the queue; returns its output."""
    script = folder / "program.py"
    script.write_text(PROGRAM)
    return submitted(conf, folder, [sys.executable, str(script), fault, str(folder / "marks")], restarts, seconds)


def submitted(conf: str, folder: Path, command: list[str], restarts: int, seconds: float, **more: str) -> str:
    """Submit a command, wait until the job has left the queue; returns its output."""
    output = folder / "output"
    env = clean_environment(
        SLURM_CONF=conf,
        SPMD_INFER_MAX_RESTARTS=str(restarts),
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        **more,
    )
    submit = ["sbatch", "--parsable", "--nodes=2", "--export=ALL", "-o", output, LAUNCH / "slurm.sbatch"]
    job = subprocess.run(
        [*map(str, submit), *command],
        env=env, capture_output=True, text=True, timeout=30, check=True,
    ).stdout.strip()  # fmt: skip
    deadline = time.monotonic() + seconds
    try:
        state, ended = "", 0
        while ended < ENDED_FOR:  # one that is put back may look as if it had ended meanwhile
            state, begins = state_of(job, env)
            ended = ended + 1 if state in ("COMPLETED", "FAILED", "NODE_FAIL", "TIMEOUT") else 0
            assert time.monotonic() < deadline, output.read_text() if output.exists() else f"never started: {state}"
            # A requeued job is held back for two minutes. Within the second of its requeue SLURM takes its credential
            # for revoked and ends it; a few seconds later it does not.
            if state == "PENDING" and begins > 10:
                update = ["scontrol", "update", f"jobid={job}", "starttime=now+4seconds"]
                subprocess.run(update, env=env, capture_output=True, check=False)
            time.sleep(0.5)
    finally:
        subprocess.run(["scancel", job], env=env, capture_output=True, check=False)
    return output.read_text()


@pytest.mark.cluster
@pytest.mark.slow
def test_sbatch(slurm: str, tmp_path: Path) -> None:
    said = sbatch(slurm, tmp_path, "nothing", 0, 120)
    assert "0: rank 0 of 2: 32 from step 0" in said
    assert "1: rank 1 of 2: 32 from step 0" in said
    assert re.search(
        r"1: \[spmd-infer rank 1\] rank 1 of 2, number 0 of 1 on its host, coordinator n1:\d+ \(SLURM job", said
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_a_killed_step_is_put_back_into_the_queue_and_goes_on(slurm: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    said = sbatch(slurm, tmp_path, "kill", 2, 240)
    print(f"\nkilled, put back and finished: {time.monotonic() - begin:.0f} s")
    assert re.search(r"the job ends: rank 1 \(\S+, pid \d+\) died: killed", said)
    assert "after 0 restarts: put back into the queue" in said
    assert re.search(r"0: rank 0 of 2: 32 from step [56]", said)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("fault", ["nothing", "raise"])
def test_mpirun(fault: str, tmp_path: Path) -> None:
    needed("mpirun", "scripts/ci-cluster install")
    env = clean_environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    command = [sys.executable, "-c", PROGRAM, fault, str(tmp_path / "marks")]
    done = subprocess.run(
        [str(LAUNCH / "mpirun.sh"), "--oversubscribe", "-n", "4", "--", *command],
        env=env, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    if fault == "nothing":
        assert done.returncode == 0, done.stderr
        assert sorted(re.findall(r"rank \d of 4: \d+ from step 0", done.stdout)) == [
            f"rank {rank} of 4: 32 from step 0" for rank in range(4)
        ]
        assert "(Open MPI)" in done.stderr
    else:
        assert done.returncode in (1, OTHER_FAILED)
        assert done.stderr.count("Traceback (most recent call last)") == 1
        assert "LookupError: on purpose" in done.stderr
        assert len(re.findall(r"the job ends: rank 1 \(\S+ pid \d+\) raised LookupError", done.stderr)) == 3


def test_what_ray_hands_over() -> None:
    """The script is run with a real Ray by hand; here is what each process is told."""
    before = list(sys.path)
    try:
        names = runpy.run_path(str(LAUNCH / "ray.py"))
    finally:
        sys.path[:] = before
    places = names["places"](3, "10.0.0.5:4711")
    assert len({place["SPMD_INFER_JOB_SECRET"] for place in places}) == 1
    for rank, env in enumerate(places):
        place = detect(env)
        assert (place.rank, place.size, place.coordinator) == (rank, 3, "10.0.0.5:4711")
        assert len(job_secret(env)) == 64
    program = "import os, sys; sys.exit(int(os.environ['SPMD_INFER_PROCESS_ID']) + 40)"
    assert names["run"]([sys.executable, "-c", program], places[2]) == 42
    killed = "import os; os.kill(os.getpid(), 9)"
    assert names["run"]([sys.executable, "-c", killed], places[0]) == 137
    assert names["OTHER_FAILED"] == OTHER_FAILED
    assert len((LAUNCH / "ray.py").read_text().splitlines()) <= 90


def test_scripts_are_short_and_executable() -> None:
    for name in ("slurm.sbatch", "mpirun.sh", "local.sh"):
        script = LAUNCH / name
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True)
        assert len(script.read_text().splitlines()) < 40
