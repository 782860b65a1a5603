"""``scripts/setup`` with a stand-in for Python that records its calls, so that no network is needed."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "cat", "cksum", "cp", "dirname", "grep", "mkdir", "mv", "rm", "sed", "tail", "touch")

PYTHON = """#!/bin/sh
# Stands for a Python: @VERSION@. Makes environments that hold a copy of itself.
echo "$0 $*" >>"@CALLS@"
case "$*" in
    -V) echo "Python @VERSION@" ;;
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip --version") ;;
    "-m pip install"*) [ ! -e "@CALLS@.broken" ] || { echo "no route to host"; exit 1; } ;;
    *ensurepip*) exit @SUITS@ ;;
    *version_info*) exit @IN_RANGE@ ;;
esac
"""


class Sandbox:
    """A copy of the files that setup reads, in a folder with a space in its name, and a PATH of a few tools."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls_file = folder / "a clone", folder / "bin", folder / "calls"
        for name in ("pyproject.toml", "constraints.txt", "requirements/demo.txt", "scripts/setup"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.root / name)
        self.bin.mkdir()
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found is not None
            (self.bin / tool).symlink_to(found)

    def python(self, name: str, version: str = "3.12.1", *, in_range: bool = True, venv: bool = True) -> Path:
        text = PYTHON.replace("@VERSION@", version).replace("@CALLS@", str(self.calls_file))
        text = text.replace("@IN_RANGE@", str(int(not in_range))).replace("@SUITS@", str(int(not (in_range and venv))))
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def setup(self, *extras: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run setup from another folder; the calls that it made are in ``installs`` afterwards."""
        self.calls_file.write_text("")
        return subprocess.run(
            [self.root / "scripts/setup", *extras],
            env={"PATH": str(self.bin), "HOME": str(self.root)} | environment,
            cwd=self.bin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def installs(self) -> list[str]:
        lines = self.calls_file.read_text().splitlines()
        return [line.split(" -m pip install ")[1] for line in lines if " -m pip install " in line]


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_first_run_installs_and_the_second_does_nothing(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    answer = sandbox.setup("dev")
    assert answer.returncode == 0, answer.stderr
    assert sandbox.installs == [
        "-c constraints.txt -e .[dev]",
        "--no-deps --require-hashes -r requirements/demo.txt",
    ]
    assert len(answer.stdout.splitlines()) == 3

    answer = sandbox.setup("dev")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
    assert sandbox.installs == []
    assert sandbox.setup().returncode == 0
    assert sandbox.installs == [], "what is there suffices for fewer extras"


def test_extras_add_up_and_changed_inputs_are_installed_again(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    sandbox.setup()
    assert sandbox.installs[0] == "-c constraints.txt -e ."
    sandbox.setup("dev")
    assert sandbox.installs[0] == "-c constraints.txt -e .[dev]"
    sandbox.setup("parity", "dev")
    assert sandbox.installs[0] == "-c constraints.txt -e .[dev,parity]"
    with (sandbox.root / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    sandbox.setup("dev")
    assert sandbox.installs[0] == "-c constraints.txt -e .[dev,parity]"


def test_a_failed_step_shows_its_end_and_is_repeated(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    broken = Path(f"{sandbox.calls_file}.broken")
    broken.touch()
    answer = sandbox.setup()
    assert answer.returncode == 1
    assert "no route to host" in answer.stderr
    assert "setup.log" in answer.stderr
    broken.unlink()
    assert sandbox.setup().returncode == 0
    assert len(sandbox.installs) == 2


def test_an_environment_that_was_only_begun_is_made_again(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    begun = sandbox.root / ".venv"
    begun.mkdir()
    (begun / ".spmd-infer-made").touch()
    (begun / "left-over").touch()
    assert sandbox.setup().returncode == 0
    assert not (begun / "left-over").exists()


def test_somebody_elses_folder_is_left_alone(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    precious = sandbox.root / ".venv" / "precious"
    precious.parent.mkdir()
    precious.touch()
    answer = sandbox.setup()
    assert answer.returncode == 1
    assert "was not made by this script" in answer.stderr
    assert precious.exists()


def test_a_moved_clone_is_installed_again(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    sandbox.setup()
    sandbox.root = sandbox.root.rename(sandbox.root.parent / "moved")
    sandbox.setup()
    assert len(sandbox.installs) == 2


def test_a_suitable_python_is_found_behind_an_unsuitable_one(sandbox: Sandbox) -> None:
    sandbox.python("python3", "3.9.2", in_range=False)
    sandbox.python("python3.12")
    answer = sandbox.setup()
    assert answer.returncode == 0, answer.stderr
    assert "making .venv with Python 3.12.1" in answer.stdout


@pytest.mark.parametrize(
    ("version", "in_range", "message"),
    [
        ("3.9.2", False, "needs Python 3.11, 3.12 or 3.13, found Python 3.9.2"),
        ("3.12.1", True, "Python 3.12.1 lacks the module venv or ensurepip; install it"),
    ],
)
def test_an_unsuitable_python_is_named(sandbox: Sandbox, version: str, in_range: bool, message: str) -> None:
    sandbox.python("python3", version, in_range=in_range, venv=False)
    answer = sandbox.setup()
    assert answer.returncode == 1
    assert message in answer.stderr
    assert not (sandbox.root / ".venv").exists()


def test_no_python_at_all(sandbox: Sandbox) -> None:
    answer = sandbox.setup()
    assert answer.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13, found no python3" in answer.stderr


def test_the_interpreter_that_was_asked_for_must_suit(sandbox: Sandbox) -> None:
    sandbox.python("python3")
    bad = sandbox.python("old", "3.8.0", in_range=False)
    answer = sandbox.setup(PYTHON=str(bad))
    assert answer.returncode == 1
    assert f"PYTHON={bad} is not Python 3.11, 3.12 or 3.13" in answer.stderr
