"""Real processes that form a job on this machine, each with its output in a file of its own."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

START_S = 120.0  # machines that run tests are busy


def clean_environment(**more: str) -> dict[str, str]:
    """This environment without what would change a job."""
    drop = ("SPMD_INFER_", "JAX_", "XLA_", "SLURM_", "OMPI_", "PMIX_", "LWS_", "JOB_")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    return kept | {"PYTHONPATH": str(Path.cwd()), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Ranks:
    """The processes of a job; kill and clean up with ``with``."""

    def __init__(
        self,
        program: str,
        size: int,
        folder: Path,
        *arguments: str,
        devices: int = 1,
        start: Sequence[int] | None = None,
        each: Mapping[int, Mapping[str, str]] | None = None,
        prefix: Mapping[int, Sequence[str]] | None = None,
        **env: str,
    ) -> None:
        common = {
            "SPMD_INFER_COORDINATOR": f"127.0.0.1:{free_port()}",
            "SPMD_INFER_NUM_PROCESSES": str(size),
            "SPMD_INFER_JOB_SECRET": secrets.token_hex(16),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        } | env
        self.folder = folder
        self.began = time.monotonic()
        self.ended: dict[int, float] = {}
        self.popen: dict[int, subprocess.Popen[bytes]] = {}
        for rank in range(size) if start is None else start:
            own = common | {"SPMD_INFER_PROCESS_ID": str(rank)} | dict((each or {}).get(rank, {}))
            with self.file(rank, "out").open("wb") as out, self.file(rank, "err").open("wb") as err:
                self.popen[rank] = subprocess.Popen(
                    [*(prefix or {}).get(rank, ()), sys.executable, "-c", program, *arguments],
                    env=clean_environment(**own),
                    stdout=out,
                    stderr=err,
                )

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.popen.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait(30)

    def file(self, rank: int, stream: str) -> Path:
        return self.folder / f"rank{rank}.{stream}"

    def out(self, rank: int) -> str:
        return self.file(rank, "out").read_text()

    def err(self, rank: int) -> str:
        return self.file(rank, "err").read_text()

    def pid(self, rank: int) -> int:
        return self.popen[rank].pid

    def until(self, text: str, ranks: Sequence[int] | None = None, seconds: float = START_S) -> None:
        """Wait until each rank has printed a text."""
        deadline = time.monotonic() + seconds
        for rank in self.popen if ranks is None else ranks:
            while text not in self.out(rank):
                assert self.popen[rank].poll() is None, f"rank {rank} ended\n{self.err(rank)}"
                assert time.monotonic() < deadline, f"rank {rank} did not print {text!r}\n{self.err(rank)}"
                time.sleep(0.02)

    def wait(self, seconds: float) -> dict[int, int]:
        """Exit codes, once all have ended; fails where one takes longer."""
        deadline = time.monotonic() + seconds
        while len(self.ended) < len(self.popen):
            for rank, process in self.popen.items():
                if rank not in self.ended and process.poll() is not None:
                    self.ended[rank] = time.monotonic()
            late = [rank for rank in self.popen if rank not in self.ended]
            if late and time.monotonic() > deadline:
                said = "\n".join(f"rank {rank}: {self.err(rank)[-2000:]}" for rank in self.popen)
                raise AssertionError(f"rank {late} still ran after {seconds} s\n{said}")
            time.sleep(0.02)
        return {rank: process.returncode for rank, process in self.popen.items()}

    def last(self) -> float:
        """When the last of them ended."""
        return max(self.ended.values())
