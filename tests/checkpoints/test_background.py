"""Saves in the background: what is saved is what was there, errors come out, a kill leaves nothing half-written."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd_infer.checkpoints import open_checkpoint, save, save_async
from spmd_infer.checkpoints.target_folder import locked
from spmd_infer.errors import CheckpointError

PROGRAM = """
import sys, jax, numpy as np
from spmd_infer.checkpoints import save_async
params = {f"t{i}": jax.numpy.full((1 << 20,), i, np.float32) for i in range(int(sys.argv[2]))}
jax.block_until_ready(params)
saving = save_async(params, sys.argv[1])
print("begun", flush=True)
if sys.argv[3] == "crash":
    raise SystemExit(3)
"""


def test_what_was_there_is_saved_while_the_program_goes_on(tmp_path: Path) -> None:
    params = {"w": jnp.arange(1 << 20, dtype=np.float32), "b": jnp.ones(7)}
    wanted = {name: np.asarray(value).tobytes() for name, value in params.items()}
    saving = save_async(params, tmp_path / "saved")
    params["w"] = params["w"] * 2  # another array under the same name
    del params["b"]
    saving.wait(60)
    assert saving.done
    saving.wait()  # again is no harm
    reader = open_checkpoint(tmp_path / "saved")
    assert {name: reader.read(name).tobytes() for name in reader.tensors} == wanted


def test_errors_come_out_where_it_is_waited_for(tmp_path: Path) -> None:
    save({"w": jnp.ones(4)}, tmp_path / "saved")
    saving = save_async({"w": jnp.zeros(4)}, tmp_path / "saved")
    with pytest.raises(CheckpointError, match="exists"):
        saving.wait(60)
    with (
        locked(tmp_path / "other", "convert"),
        pytest.raises(CheckpointError, match="is being written by convert, process"),
    ):
        save_async({"w": jnp.zeros(4)}, tmp_path / "other").wait(60)
    with pytest.raises(CheckpointError, match=r"expected a jax\.Array"):
        save_async({"w": np.zeros(4)}, tmp_path / "third")  # type: ignore[dict-item]  # what is refused
    assert open_checkpoint(tmp_path / "saved").read("w").tolist() == [1, 1, 1, 1]


def test_a_donated_array_is_named(tmp_path: Path) -> None:
    params = {"kept": jnp.ones(4), "given": jnp.ones(1 << 16)}
    jax.jit(lambda x: x + 1, donate_argnums=0)(params["given"])
    assert params["given"].is_deleted()
    with pytest.raises(CheckpointError, match="save failed: given donated"):
        save_async(params, tmp_path / "saved").wait(60)
    assert list(tmp_path.iterdir()) == []


def test_waiting_ends_in_time(tmp_path: Path) -> None:
    saving = save_async({f"t{i}": jnp.ones(1 << 20) for i in range(16)}, tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"is still being saved after 0\.0 s"):
        saving.wait(0.0)
    saving.wait(60)


@pytest.mark.parametrize("end", ["normal", "crash"])
def test_the_interpreter_waits_for_a_save(tmp_path: Path, end: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "saved"), "24", end], capture_output=True, text=True, timeout=120
    )
    assert answer.returncode == (3 if end == "crash" else 0), answer.stderr
    reader = open_checkpoint(tmp_path / "saved")
    assert reader.read("t23").tobytes() == np.full(1 << 20, 23, np.float32).tobytes()


def test_a_kill_leaves_no_half_written_target(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "saved"), "64", "normal"]
    caught = False
    for moment in (0.0, 0.02, 0.1):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(moment)
            process.send_signal(signal.SIGKILL)
            process.wait(60)
        if (tmp_path / "saved").exists():  # whole, or it would not be there
            assert len(open_checkpoint(tmp_path / "saved").tensors) == 64
            break
        caught = True
    assert caught
    params = {"w": jnp.ones(4)}
    save(params, tmp_path / "saved", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
