"""``doctor --cluster``, started as a job of three processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks, clean_environment

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DOCTOR = str(Path(sys.executable).parent / "spmd-infer")


def doctor(*arguments: str, shell: str = "") -> tuple[int, dict[str, dict[str, str]]]:
    command = [DOCTOR, "doctor", "--cluster", "--json", *arguments]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
    done = subprocess.run(
        [DOCTOR, "launch", "--nprocs", "3", "--devices-per-process", "1", "--", *command],
        env=clean_environment(), capture_output=True, text=True, timeout=150, check=False,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('[0] {"ok"')]
    return done.returncode, {each["what"]: each for each in json.loads(line[4:])["findings"]}


def test_ranks_that_agree() -> None:
    code, found = doctor("--path", "tests/fixtures/digits_cnn")
    assert code == 0
    assert all(each["level"] == "ok" for each in found.values())
    assert found["processes"]["found"].startswith("3 on ")
    assert "version of jax" in found["versions and settings"]["found"]
    assert found["ports"]["found"] == "every rank reaches every other"
    shown = ("clocks", "control channel", "TCP", "link")
    print("\n" + "\n".join(f"{name}: {found[name]['found']}" for name in shown))


def test_ranks_that_differ(tmp_path: Path) -> None:
    missing = tmp_path / "only on rank 1"
    shell = f'if [ "$SPMD_INFER_PROCESS_ID" = 1 ]; then export JAX_DEFAULT_MATMUL_PRECISION=highest; fi; : "{missing}"'
    code, found = doctor("--path", str(missing), shell=shell)
    assert code == 6
    settings = found["versions and settings"]
    assert settings["level"] == "problem"
    assert settings["found"].startswith("variable JAX_DEFAULT_MATMUL_PRECISION: nothing on rank 0 (")
    assert "highest on rank 1 (" in settings["found"]
    assert found[str(missing)]["found"] == "does not exist on any host"


CLOSED = """
import socket, time
from spmd_infer.cli import cluster_checks, cluster_links
import spmd_infer as si

with si.initialize(quiet=True) as job:
    if job.rank == 2:  # a host whose firewall lets nothing in, and whose clock is wrong
        listener, now = cluster_links.listen(job), time.time
        listener.close()
        closed = socket.socket()
        closed.bind(("127.0.0.1", 0))  # it does not listen
        cluster_links.listen = lambda job: closed
        time.time = lambda: now() + 90
    for finding in cluster_checks.check_cluster(job, []):
        print(finding.level, finding.what, finding.found, sep="|")
"""


def test_a_host_that_cannot_be_reached_and_a_clock_that_is_wrong(tmp_path: Path) -> None:
    with Ranks(CLOSED, 3, tmp_path) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(2)
        found = {line.split("|")[1]: line for line in ranks.out(0).splitlines()}
        assert "does not reach rank 2 (" in found["ports"]
        assert found["ports"].startswith("problem|ports|rank 0 (")
        assert "Connection refused; 2 connections fail" in found["ports"]
        assert "link" not in found  # the collective would hang
        assert "rank 2 (" in found["clocks"]
        assert "is +90.0 s off" in found["clocks"]
        assert ranks.out(0) == ranks.out(1) == ranks.out(2)
