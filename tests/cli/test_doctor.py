"""Doctor names what is there and what is wrong, and its checks see real faults."""

import json
import os
from pathlib import Path

import pytest

from spmd_infer.cli import accelerators, checks
from tests.cli.test_commands import run


def test_a_sound_machine() -> None:
    answer = run("doctor", "--json", XLA_FLAGS="--xla_force_host_platform_device_count=3", JAX_PLATFORMS="cpu")
    document = json.loads(answer.stdout)
    found = {finding["what"]: finding for finding in document["findings"]}
    assert found["devices"]["found"].startswith("3 cpu")
    assert found["XLA_FLAGS"]["found"] == "--xla_force_host_platform_device_count=3"
    assert {"python", "jax", "flax", "cores", "host memory", "compile cache", "demo:smollm2"} <= set(found)
    assert document["ok"] is not any(finding["level"] == "problem" for finding in document["findings"])
    assert answer.returncode == (0 if document["ok"] else 6)


def test_a_backend_that_does_not_start_is_a_problem() -> None:
    answer = run("doctor", JAX_PLATFORMS="abacus")
    assert answer.returncode == 6
    assert "! devices" in answer.stdout
    assert "abacus" in answer.stdout
    assert "1 problem found" in answer.stdout


def test_a_start_that_hangs_is_cut_off() -> None:
    assert accelerators.jax_devices(timeout=0.001) == {"error": "JAX did not start within 0.001 s"}


def test_gpus_that_jax_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    seen = {"devices": [{"platform": "cpu", "kind": "cpu", "memory": None}]}
    problem = [f for f in accelerators.check_devices(seen, ["NVIDIA L4, 580.1"]) if f.level == "problem"]
    assert "JAX sees none" in problem[0].found
    assert "spmd-infer[cuda13]" in problem[0].advice


def test_compile_cache_that_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def level(folder: str) -> str:
        monkeypatch.setenv("SPMD_INFER_COMPILE_CACHE", folder)
        (finding,) = checks.check_compile_cache()
        return finding.level

    tmp_path.chmod(0o777)
    assert level(str(tmp_path)) == "problem"
    tmp_path.chmod(0o700)
    assert level(str(tmp_path)) == "ok"
    assert level(str(tmp_path / "absent")) == "ok"
    assert level("off") == "hint"


def test_secrets_are_not_shown_and_nonsense_is_reported() -> None:
    findings = list(checks.check_variables({"HF_TOKEN": "abc", "XLA_PYTHON_CLIENT_MEM_FRACTION": "90", "PATH": "x"}))
    assert "abc" not in str(findings)
    assert [f.what for f in findings] == ["HF_TOKEN", *["XLA_PYTHON_CLIENT_MEM_FRACTION"] * 2]
    assert findings[-1].level == "problem"


def test_versions_that_do_not_belong_together(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = dict.fromkeys(checks.PACKAGES, "1.0") | {"jax": "0.12.0", "jaxlib": "0.11.1"}
    monkeypatch.setattr(checks.metadata, "version", versions.__getitem__)
    problems = [f.what for f in checks.check_packages() if f.level == "problem"]
    assert "jaxlib" in problems
    assert "flax" not in problems


def test_host_figures_are_those_of_this_process() -> None:
    found = {finding.what: finding.found for finding in checks.check_host()}
    assert found["cores"].startswith(f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
