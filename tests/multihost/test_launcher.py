"""``spmd-infer launch``: prefixes, signals, quick failure; programs here use no JAX."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd_infer.multihost.exit_codes import REQUEUE
from spmd_infer.multihost.launcher import rank_environments
from tests.multihost.processes import clean_environment

COMMAND = [str(Path(sys.executable).parent / "spmd-infer"), "launch"]


def launch(program: str, nprocs: int = 3, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, "--nprocs", str(nprocs), *options, "--", sys.executable, "-c", program]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False)


def test_output_carries_the_rank_and_each_has_its_place() -> None:
    program = (
        "import os; print(*(os.environ['SPMD_INFER_' + n] for n in ('PROCESS_ID', 'NUM_PROCESSES', 'LOCAL_SIZE')))"
    )
    done = launch(program + "; print(os.environ['XLA_FLAGS'])", 3, "--devices-per-process", "2")
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    flags = "--xla_force_host_platform_device_count=2"
    assert lines == sorted(line for r in range(3) for line in (f"[{r}] {r} 3 3", f"[{r}] {flags}"))


def test_all_end_when_one_fails_and_its_traceback_is_last() -> None:
    begin = time.monotonic()
    done = launch(
        "import os, sys, time\n"
        "if os.environ['SPMD_INFER_PROCESS_ID'] == '1': raise ValueError('on purpose')\n"
        "time.sleep(100)"
    )
    seconds = time.monotonic() - begin
    print(f"\nall ended after {seconds:.1f} s")
    assert seconds < 20
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert done.stderr.endswith("[1] ValueError: on purpose\n")
    assert "[launch] rank 1 (pid" in done.stderr


def test_a_traceback_that_is_only_logged_is_shown_in_time() -> None:
    done = launch(
        "import sys, time, traceback\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: traceback.print_exc()\n"
        "time.sleep(6); print('after', file=sys.stderr)",
        1,
    )
    assert done.returncode == 0
    lines = done.stderr.splitlines()
    assert lines.index("[0] ZeroDivisionError: division by zero") < lines.index("[0] after")


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (REQUEUE, REQUEUE)])
def test_signals_are_passed_on(code: int, expected: int) -> None:
    program = (
        "import signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    command = [*COMMAND, "-n", "2", "--", sys.executable, "-c", program]
    with subprocess.Popen(command, env=clean_environment(), stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert {running.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == expected


def test_killed_processes_give_128_and_the_signal() -> None:
    done = launch("import os; os.kill(os.getpid(), 9)", 1)
    assert done.returncode == 137
    assert "failed first, with signal 9" in done.stderr


def test_one_launcher_on_each_host_of_a_scheduler() -> None:
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": "n[1-2]",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "1",
        "SPMD_INFER_JOB_SECRET": "0123456789abcdef",
    }
    found = rank_environments(4, None, slurm)
    assert [env["SPMD_INFER_PROCESS_ID"] for env in found] == ["4", "5", "6", "7"]
    assert [env["SPMD_INFER_LOCAL_RANK"] for env in found] == ["0", "1", "2", "3"]
    assert {env["SPMD_INFER_NUM_PROCESSES"] for env in found} == {"8"}
    assert found[0]["SPMD_INFER_COORDINATOR"].startswith("n1:")
    assert {env["SPMD_INFER_JOB_SECRET"] for env in found} == {"0123456789abcdef"}
    assert os.environ.get("SPMD_INFER_PROCESS_ID") is None
