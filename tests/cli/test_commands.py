"""The command line as a user meets it: in a process of its own, from any folder."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spmd_infer import __version__

COMMAND = [str(Path(sys.executable).parent / "spmd-infer")]
VERBS = ("infer", "generate", "embed", "classify", "plan", "bench", "eval", "doctor")


def run(
    *arguments: str, cwd: Path | None = None, stdin: str = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``spmd-infer`` in an environment without settings, except for the compile cache of these tests."""
    clean = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("SPMD_INFER_", "JAX_", "XLA_")) or key == "SPMD_INFER_COMPILE_CACHE"
    }
    return subprocess.run(
        [*COMMAND, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=cwd,
        env=clean | {"COLUMNS": "200"} | environment,
        timeout=300,
    )


def test_help_answers_within_a_second() -> None:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        answer = run("--help")
        seconds.append(time.perf_counter() - begin)
        assert answer.returncode == 0
    assert all(verb in answer.stdout for verb in VERBS)
    assert statistics.median(seconds) < 1.0, seconds


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_offers_json(verb: str) -> None:
    answer = run(verb, "--help")
    assert answer.returncode == 0
    assert "--json" in answer.stdout
    if verb not in ("bench", "doctor"):
        for option in ("--mesh", "--devices", "--dtype"):
            assert option in answer.stdout


def test_version() -> None:
    assert run("--version").stdout == f"spmd-infer {__version__}\n"


def test_shell_completion() -> None:
    answer = run("--show-completion", "bash")
    assert answer.returncode == 0
    assert "_SPMD_INFER_COMPLETE" in answer.stdout


def test_no_verb_shows_help() -> None:
    answer = run()
    assert answer.returncode == 2
    assert "Usage: spmd-infer" in answer.stdout + answer.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["conjure"], 2, "No such command 'conjure'"),
        (["embed"], 2, "Missing argument"),
        (["embed", "demo:minilm"], 2, "no texts: give them as arguments"),
        (["embed", "demo:minilm", "x", "--file", __file__], 2, "not both"),
        (["embed", "demo:minilm", "x", "--devices", "0"], 2, "--devices"),
        (["classify", "demo:efficientnet-lite0", "absent.png"], 2, "'absent.png' does not exist"),
        (["infer", "demo:minilm", "-o", "y.csv", __file__], 2, "must end in .npz"),
        (["infer", "demo:minilm", "absent.npz"], 2, "'absent.npz' does not exist"),
        (["generate", "demo:smollm2", "--file", "absent.txt"], 2, "'absent.txt' does not exist"),
        (["embed", "demo:gpt5", "x"], 3, "error: there is no 'demo:gpt5'; the demos are demo:smollm2"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_message_and_their_code(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    answer = run(*arguments, cwd=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_debug_shows_the_traceback() -> None:
    answer = run("embed", "demo:gpt5", "x", "--debug")
    assert answer.returncode == 1
    assert "Traceback" in answer.stderr
    assert "CheckpointError: there is no 'demo:gpt5'" in answer.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mash: auto\n", "no verb has an option 'mash'"),
        ("generate:\n  max-tokenz: 3\n", "'generate' has no option 'max-tokenz'"),
        ("generate: 3\n", "'generate' must hold options"),
        ("- a\n- b\n", "cannot read"),
        ("a: [\n", "cannot read"),
    ],
)
def test_configuration_mistakes(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    answer = run("--config", str(file), "doctor")
    assert answer.returncode == 2, answer.stderr
    assert message in answer.stderr


def test_an_option_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("mesh: data=5\nplan:\n  devices: 5\n")
    chosen = ["plan", "demo:minilm", "--json"]

    def size(*before: str, after: tuple[str, ...] = (), **environment: str) -> int:
        answer = run(*before, *chosen, *after, **environment)
        assert answer.returncode == 0, answer.stderr
        mesh = json.loads(answer.stdout)["mesh"]
        assert set(mesh) == {"data"}
        return int(mesh["data"])

    config = ("--config", str(file))
    assert size(*config) == 5
    assert size(*config, SPMD_INFER_MESH="data=4", SPMD_INFER_DEVICES="4") == 4
    assert size(*config, after=("--mesh", "data=2", "--devices", "2"), SPMD_INFER_MESH="data=4") == 2
