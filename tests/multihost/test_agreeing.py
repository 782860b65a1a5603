"""Fingerprints, secrets, the shared record, and sealed frames."""

import os
import stat
from pathlib import Path

import pytest

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.fingerprint import difference, of_checkpoint, of_environment, of_program
from spmd_infer.multihost.record import Record, StepState
from spmd_infer.multihost.sealed import BadSealError, Seal
from spmd_infer.multihost.secret import job_secret, secret_file


def test_the_rank_that_differs_is_found() -> None:
    same = {"mesh": "data=2", "plan": "x"}
    assert difference([same, dict(same), same]) is None
    assert difference([same, same, same | {"plan": "y"}]) == (0, 2, "plan")
    assert difference([same | {"mesh": "data=4"}, same, same]) == (0, 1, "mesh")
    assert difference([same, {"mesh": "data=2"}]) == (0, 1, "plan")


def test_programs_are_compared_without_the_names_of_files() -> None:
    hlo = 'HloModule f\n %a = f32[2] add(%b, %c), metadata={op_name="jit(f)/add" source_file="/x/y.py" source_line=3}\n'
    assert of_program(hlo) == of_program(hlo.replace("/x/y.py", "/z/y.py"))
    assert of_program(hlo) != of_program(hlo.replace("add(", "sub("))
    assert of_environment()["version of jax"]


def test_a_checkpoint_is_known_by_its_manifest_or_a_sample(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(bytes(200_000))
    before = of_checkpoint(tmp_path, {})
    assert before == of_checkpoint(tmp_path, {})
    assert before != of_checkpoint(tmp_path, {"t": 1})
    file.write_bytes(bytes(199_999) + b"\x01")
    assert before != of_checkpoint(tmp_path, {})


def test_a_secret_is_made_once_and_private(tmp_path: Path) -> None:
    env = {"XDG_CONFIG_HOME": str(tmp_path)}
    first = job_secret(env)
    assert len(first) == 64
    assert job_secret(env) == first
    path = secret_file(env)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["job-secret"]
    path.chmod(0o644)
    with pytest.raises(ClusterError, match=r"can be read by others .*mode 644"):
        job_secret(env)
    assert job_secret(env | {"SPMD_INFER_JOB_SECRET": "0123456789abcdef"}) == b"0123456789abcdef"
    with pytest.raises(ClusterError, match="has 3 characters, expected 16 or more"):
        job_secret({"SPMD_INFER_JOB_SECRET": "abc"})


def test_the_record_is_seen_through_another_mapping() -> None:
    record = Record.create()
    guard = Record(os.dup(record.fd))
    record.write_step(StepState(3, 12.5, 2.5, "decode " * 20))
    step = guard.read_step()
    assert (step.number, step.deadline, step.began) == (3, 12.5, 2.5)
    assert step.name == ("decode " * 20)[:48]
    record.end_step(3)
    assert guard.read_step() == StepState(3, 0.0, 0.0, "")
    record.alive, record.point = 7.5, 9
    assert (guard.alive, guard.point) == (7.5, 9)
    assert not record.frozen
    guard.freeze()
    assert record.frozen


def test_sealed_frames() -> None:
    ours, theirs = Seal(b"k", b"a", b"b", server=True), Seal(b"k", b"a", b"b", server=False)
    frame = ours.close({"t": "x"})
    again = ours.close({"t": "y"})
    mac, content = frame[4:36], frame[36:]
    with pytest.raises(BadSealError):  # out of order
        theirs.open(again[4:36], again[36:])
    with pytest.raises(BadSealError):  # altered
        theirs.open(mac, content + b" ")
    with pytest.raises(BadSealError):  # sent back to its writer
        ours.open(mac, content)
    with pytest.raises(BadSealError):  # another connection
        Seal(b"k", b"a", b"c", server=False).open(mac, content)
    assert theirs.open(mac, content) == {"t": "x"}
    with pytest.raises(BadSealError):  # once more
        theirs.open(mac, content)
