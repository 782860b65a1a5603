"""``doctor --cluster``, started as a job of three processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.multihost.processes import clean_environment

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
    print("\n" + "\n".join(f"{name}: {each['found']}" for name, each in found.items() if name in ("clocks", "link")))


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
