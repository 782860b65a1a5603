"""The compile cache: private, or not used; and a corrupt entry costs a compilation, not a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spmd_infer.compile_cache import VARIABLE, default_folder, problem_of, use_compile_cache

PROGRAM = """
import jax, numpy as np, warnings
from spmd_infer.compile_cache import use_compile_cache
print(use_compile_cache())
print(float(jax.jit(lambda x: (x @ x).sum())(np.ones((8, 8), np.float32))))
"""


def run(folder: Path) -> tuple[list[str], str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, VARIABLE: str(folder), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.splitlines(), done.stderr


def test_made_private_and_reused(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    assert run(folder) == ([str(folder), "512.0"], "")
    assert folder.stat().st_mode & 0o777 == 0o700
    entries = {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.endswith("-cache")}
    assert entries
    assert run(folder) == ([str(folder), "512.0"], "")
    assert {path: path.stat().st_mtime_ns for path in entries} == entries  # found, not compiled again


def test_a_corrupt_entry_is_compiled_again(tmp_path: Path) -> None:
    run(tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        if path.name.endswith("-cache"):
            path.write_bytes(b"\x00" * 100)
    (_, value), said = run(tmp_path / "cache")
    assert value == "512.0"
    assert "warn" in said.lower() or "error" in said.lower()


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.warns(RuntimeWarning, match="can be written by others .mode 777.; run: chmod 700"):
        assert use_compile_cache(tmp_path) is None


def test_what_is_no_folder_and_what_is_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert problem_of(file) == "is not a folder"
    with pytest.warns(RuntimeWarning, match="no compile cache"):
        assert use_compile_cache(file / "below") is None
    monkeypatch.setenv(VARIABLE, "off")
    assert use_compile_cache() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "spmd-infer" / "xla"
