"""A job's folder, beside its output: what the job is, its units, what each rank of each run has done.

out.jsonl.job/
    job.json           the job; written last, so that a job that has it has all it needs
    checkpoint         fingerprint of the model's files
    units.msgpack      its units
    logs/0003-02       what rank 2 did in the third run (``log``)
    claims/0003/17     unit 17 is some rank's, in the third run
    done.json          its figures; once this is there, logs and claims are gone
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from spmd_infer.checkpoints.target_folder import flush, is_locked, locked
from spmd_infer.errors import CheckpointError, JobError, JobHeldError
from spmd_infer.jobs.spec import JobSpec, differences
from spmd_infer.jobs.units import WorkPlan


class JobRecord(msgspec.Struct, frozen=True):
    """What a job is, as its folder says.

    Attributes:
        spec: the job.
        source: fingerprint of its input.
        created: when it began, in seconds since 1970.
    """

    spec: JobSpec
    source: str
    created: int


class Figures(msgspec.Struct, frozen=True):
    """What came of a job.

    Attributes:
        rows: of the input.
        failed: rows without a result.
        quarantined: those of them that crashed the process.
        cut: texts that lost their ends.
        cost: of all rows.
        counts: what the cost counts.
        runs: how many runs it took.
        seconds: from the beginning of the first run to the end.
    """

    rows: int
    failed: int
    quarantined: int
    cut: int
    cost: int
    counts: str
    runs: int
    seconds: float


class JobFolder:
    """The folder of a job.

    Args:
        output: the job's output file.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.errors = output.with_name(f"{output.stem}.errors.jsonl")
        self.path = output.with_name(f"{output.name}.job")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the job: nobody else can run it meanwhile.

        Raises:
            JobHeldError: another process holds it; says which.
            JobError: the output's folder does not exist or cannot be written.
        """
        lock = locked(self.output, "run a batch job")
        try:
            lock.__enter__()
        except CheckpointError as error:
            if is_locked(self.output):
                raise JobHeldError(f"the same job is under way: {error}") from None
            raise JobError(str(error)) from error
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def record(self) -> JobRecord | None:
        """The job that the folder holds; None where it holds none.

        Raises:
            JobError: it cannot be read.
        """
        found: JobRecord | None = self._read("job.json", JobRecord)
        return found

    def figures(self) -> Figures | None:
        """What came of the job; None where it is not finished."""
        found: Figures | None = self._read("done.json", Figures)
        return found

    def plan(self) -> WorkPlan:
        """The job's units.

        Raises:
            JobError: they cannot be read.
        """
        try:
            return msgspec.msgpack.decode((self.path / "units.msgpack").read_bytes(), type=WorkPlan)
        except (OSError, msgspec.DecodeError) as error:
            raise JobError(
                f"{self.path}/units.msgpack cannot be read ({error}); the output must lie on storage that all ranks see"
            ) from error

    def create(self, record: JobRecord, plan: WorkPlan) -> None:
        """Begin a new job, in place of what the folder may hold.

        Raises:
            JobError: it cannot be written.
        """
        with written(self.path):
            shutil.rmtree(self.path, ignore_errors=True)
            (self.path / "logs").mkdir(parents=True)
            self._write("units.msgpack", msgspec.msgpack.encode(plan))
            self._write("job.json", msgspec.json.format(msgspec.json.encode(record)))

    def logs(self) -> list[Path]:
        """What all runs have written, oldest first."""
        return sorted((self.path / "logs").iterdir(), key=lambda path: tuple(map(int, path.name.split("-"))))

    def log(self, run: int, rank: int) -> Path:
        """Where a rank of a run writes."""
        return self.path / "logs" / f"{run:04d}-{rank:02d}"

    def new_run(self) -> int:
        """The number of a run that begins; those before it claim nothing any more.

        Raises:
            JobError: it cannot be written.
        """
        run = 1 + max((int(path.name.partition("-")[0]) for path in self.logs()), default=0)
        with written(self.path):
            shutil.rmtree(self.path / "claims", ignore_errors=True)
            self._claims(run).mkdir(parents=True)
        return run

    def claim(self, run: int, what: str) -> bool:
        """Whether something is now this rank's; False where another was first.

        Raises:
            JobError: it cannot be written.
        """
        with written(self.path):
            try:
                os.close(os.open(self._claims(run) / what, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
        return True

    def claimed(self, run: int, what: str) -> bool:
        """Whether something has been claimed."""
        return (self._claims(run) / what).exists()

    def sees(self, run: int) -> bool:
        """Whether this host sees what rank 0 has begun."""
        return self._claims(run).is_dir()

    def finish(self, figures: Figures) -> None:
        """Keep only the figures; the output is in its place."""
        with written(self.path):
            self._write("done.json", msgspec.json.encode(figures))
            for name in ("logs", "claims"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            (self.path / "units.msgpack").unlink(missing_ok=True)

    def check_same(self, record: JobRecord, spec: JobSpec) -> None:
        """Refuse to go on with a job that is another one.

        Raises:
            JobError: says what differs.
        """
        found = differences(record.spec, spec)
        if found:
            raise JobError(
                f"{self.path} holds a job with other options: {'; '.join(found)}. Give the same ones to go on with it, "
                "another output, or --overwrite to begin anew"
            )

    def check_checkpoint(self, fingerprint: str) -> None:
        """Refuse to go on with other weights than those that earlier results came from.

        Raises:
            JobError: they are others.
        """
        path = self.path / "checkpoint"
        with written(self.path):
            if not path.exists():
                self._write("checkpoint", fingerprint.encode())
            elif path.read_text() != fingerprint:
                raise JobError(
                    f"the model's files are others than when the job began; restore them, or remove {self.path} to "
                    "begin anew"
                )

    def _claims(self, run: int) -> Path:
        return self.path / "claims" / f"{run:04d}"

    def _read(self, name: str, kind: Any) -> Any:
        try:
            content = (self.path / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise JobError(f"{self.path / name}: cannot be read: {error.strerror}") from error
        try:
            return msgspec.json.decode(content, type=kind)
        except msgspec.DecodeError as error:
            raise JobError(f"{self.path / name} is damaged: {error}; remove the folder to begin anew") from error

    def _write(self, name: str, content: bytes) -> None:
        part = self.path / f".{name}"
        part.write_bytes(content)
        flush(part)
        part.replace(self.path / name)
        flush(self.path)


@contextmanager
def written(path: Path) -> Iterator[None]:
    """Turn the operating system's errors while writing into ``JobError``."""
    try:
        yield
    except OSError as error:
        free = ""
        with suppress(OSError):
            free = f"; {shutil.disk_usage(path.parent).free} bytes are free there"
        raise JobError(f"{error.filename or path}: cannot be written: {error.strerror or error}{free}") from error
