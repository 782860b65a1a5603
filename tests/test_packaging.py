"""What is installed is what stands here, and ``models`` and ``checkpoints`` are reached under one name only."""

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def _python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code in ``folder`` with that folder importable, as ``python`` at a prompt has it."""
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["models", "checkpoints"])
def test_importing_by_the_folder_name_is_refused(name: str) -> None:
    answer = _python(f"import {name}", ROOT)
    assert answer.returncode == 1
    assert re.search(rf"ImportError: .*'spmd_infer\.{name}'.*write 'import spmd_infer\.{name}'", answer.stderr)


@pytest.mark.parametrize("name", ["models", "checkpoints"])
def test_a_users_own_package_of_that_name_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("mine = True\n")
    code = f"import {name}, spmd_infer.{name} as ours; assert {name}.mine; assert not hasattr(ours, 'mine')"
    answer = _python(code, tmp_path)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize("name", ["models", "checkpoints"])
def test_links_are_relative(name: str) -> None:
    assert (ROOT / "spmd_infer" / name).readlink() == Path("..") / name


def test_every_package_is_listed() -> None:
    folders = {
        Path(folder).relative_to(ROOT)
        for top in ("spmd_infer", "models", "checkpoints")
        for folder, _, files in os.walk(ROOT / top)
        if any(name.endswith(".py") for name in files)
    }
    assert [folder for folder in sorted(folders) if not (ROOT / folder / "__init__.py").is_file()] == []
    named = {
        ".".join(folder.parts) if folder.parts[0] == "spmd_infer" else ".".join(("spmd_infer", *folder.parts))
        for folder in folders
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == named


def test_importing_the_package_starts_nothing_heavy() -> None:
    heavy = "{'jax', 'flax', 'orbax', 'tokenizers', 'PIL', 'torch', 'rich'}"
    answer = _python(f"import sys, spmd_infer, spmd_infer.cli; print({heavy} & set(sys.modules))", ROOT)
    assert answer.stdout.strip() == "set()", answer.stdout + answer.stderr


def test_constraints_name_versions_only_and_cover_what_is_required() -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            assert pin.url is None, line
            assert [spec.operator for spec in pin.specifier] == ["=="], line
            pins.setdefault(_canonical(pin.name), []).append(pin)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["parity"]]
    for requirement in map(Requirement, wanted):
        pinned = pins.get(_canonical(requirement.name), [])
        for python in ("3.11", "3.12", "3.13"):
            held = [p for p in pinned if p.marker is None or p.marker.evaluate({"python_version": python})]
            assert len(held) == 1, f"{requirement.name} on Python {python}: {[str(p) for p in held]}"
            (exact,) = held[0].specifier
            assert requirement.specifier.contains(exact.version), f"{requirement} against {held[0]}"


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_installed_metadata_is_of_this_source() -> None:
    from spmd_infer import __version__

    assert version("spmd-infer") == __version__ == PROJECT["project"]["version"]
    core = {_canonical(r.name) for r in map(Requirement, requires("spmd-infer") or []) if "extra" not in str(r.marker)}
    assert core == {_canonical(Requirement(r).name) for r in PROJECT["project"]["dependencies"]}


def test_the_tests_run_without_torch() -> None:
    try:
        version("torch")
    except PackageNotFoundError:
        return
    # CI adds torch for the parity tests; the rest must still not import it.
    answer = _python("import sys, spmd_infer.models, spmd_infer.checkpoints; print('torch' in sys.modules)", ROOT)
    assert answer.stdout.strip() == "False", answer.stderr
