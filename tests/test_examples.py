"""The examples run as a stranger would run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, tmp_path: Path, timeout: int) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**environment, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_own_models(tmp_path: Path) -> None:
    lines = run("own_models.py", tmp_path, 120).splitlines()
    assert [line.split(":")[0] for line in lines] == ["NNX module", "Linen module", "function"]
    assert all("(10, 512)" in line and "weights name no axes" in line for line in lines)


@pytest.mark.slow
@pytest.mark.demo
@pytest.mark.usefixtures("smollm2", "minilm", "efficientnet", "imagenet_pictures")
def test_quickstart(tmp_path: Path) -> None:
    printed = run("quickstart.py", tmp_path, 480)
    assert "mesh data=2,model=4" in printed
    assert "The capital of France is Paris." in printed
    assert "shows: bull mastiff" in printed
    ranked = [line.split("  ")[-1] for line in printed.splitlines() if line.startswith("   0.")]
    assert ranked[0] == "The recipe needs flour, water and yeast."
    assert printed.splitlines()[-1].startswith("Next: ")
