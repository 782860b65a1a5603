"""Start the processes of a job on this host, show what they print by rank, and end all of them when one fails."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO

from spmd_infer.multihost.detection import (
    COORDINATOR,
    LOCAL_RANK,
    LOCAL_SIZE,
    NUM_PROCESSES,
    PROCESS_ID,
    detect,
)
from spmd_infer.multihost.exit_codes import OTHER_FAILED, REQUEUE
from spmd_infer.multihost.secret import JOB_SECRET

OWN_END_S = 6.0
"""Seconds that the others have to end by themselves, as ranks of a job do, once a process has failed."""

KILL_S = 3.0
HOLD_S = 4.0
_TRACEBACK = b"Traceback (most recent call last):"


@dataclass
class _Process:
    """A rank's process, and what it has printed since a traceback began."""

    rank: int
    popen: subprocess.Popen[bytes]
    held: list[bytes] = field(default_factory=list)
    held_since: float = 0.0
    readers: list[threading.Thread] = field(default_factory=list)
    code: int | None = None


class Launcher:
    """Runs one command as several processes.

    Args:
        command: what to run, the same for every rank.
        processes: how many processes on this host.
        devices: simulate so many CPU devices in each; None leaves JAX's devices as they are.
        env: the environment to start from. Where a scheduler started this launcher once on each of several hosts, the
            job spans them, and ranks are numbered host by host.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int | None, env: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environments = rank_environments(processes, devices, env)
        self._processes: list[_Process] = []
        self._lock = threading.Lock()
        self._signals = 0

    def run(self) -> int:
        """Until all have ended; returns the exit code for the launcher: 0, or that of the rank at fault.

        Raises:
            OSError: the command cannot be started.
        """
        before = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for env in self._environments:
                self._start(env)
            return self._watch()
        finally:
            for process in self._processes:
                if process.popen.poll() is None:
                    process.popen.kill()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _start(self, env: dict[str, str]) -> None:
        popen = subprocess.Popen(
            self._command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C comes here only, and from here once to each
        )
        process = _Process(int(env[PROCESS_ID]), popen)
        assert popen.stdout is not None
        assert popen.stderr is not None
        for pipe, out, hold in ((popen.stdout, sys.stdout, False), (popen.stderr, sys.stderr, True)):
            thread = threading.Thread(target=self._copy, args=(process, pipe, out.fileno(), hold), daemon=True)
            thread.start()
            process.readers.append(thread)
        self._processes.append(process)

    def _copy(self, process: _Process, pipe: IO[bytes], out: int, hold: bool) -> None:
        """Copy lines with their rank in front. A traceback is kept for a while: it may turn out to be the last word."""
        prefix = f"[{process.rank}] ".encode()
        for line in pipe:
            if not line.endswith(b"\n"):
                line += b"\n"
            with self._lock:
                if hold and line.startswith(_TRACEBACK):
                    process.held_since = process.held_since or time.monotonic()
                if hold and process.held_since:
                    process.held.append(prefix + line)
                else:
                    _write(out, prefix + line)

    def _release(self, process: _Process) -> None:
        for line in process.held:
            _write(2, line)
        process.held.clear()
        process.held_since = 0.0

    def _release_old(self, now: float) -> None:
        """A process that lives on after its traceback has only logged it."""
        with self._lock:
            for process in self._processes:
                if process.code is None and process.held_since and now - process.held_since > HOLD_S:
                    self._release(process)

    def _watch(self) -> int:
        first: _Process | None = None
        failed_at = told_at = 0.0
        while any(process.code is None for process in self._processes):
            for process in self._processes:
                if process.code is None and process.popen.poll() is not None:
                    process.code = _code(process.popen.returncode)
                    if process.code not in (0, REQUEUE) and (first is None or first.code == OTHER_FAILED):
                        first, failed_at = process, failed_at or time.monotonic()
            now = time.monotonic()
            self._release_old(now)
            if first is not None and not told_at and now - failed_at > OWN_END_S:
                told_at = now
                self._signal(signal.SIGTERM)
            if told_at and now - told_at > KILL_S:
                self._signal(signal.SIGKILL)
            time.sleep(0.05)
        for process in self._processes:
            for reader in process.readers:
                reader.join(2)
        return self._conclude(first)

    def _conclude(self, first: _Process | None) -> int:
        """Show what is still held, the traceback of the rank that failed first at the very end."""
        with self._lock:
            for process in self._processes:
                if process is not first:
                    self._release(process)
            if first is None:
                codes = {process.code for process in self._processes}
                return REQUEUE if REQUEUE in codes else 0
            assert first.code is not None
            how = f"signal {first.code - 128}" if first.code > 128 else f"exit code {first.code}"
            _write(2, f"[launch] rank {first.rank} (pid {first.popen.pid}) failed first, with {how}\n".encode())
            self._release(first)
            return first.code

    def _forward(self, number: int, _: object) -> None:
        self._signals += 1
        self._signal(signal.SIGKILL if self._signals > 2 else signal.Signals(number))

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.popen.poll() is None:
                process.popen.send_signal(number)


def rank_environments(processes: int, devices: int | None, env: Mapping[str, str]) -> list[dict[str, str]]:
    """The environment of each process on this host.

    Raises:
        ClusterError: a scheduler's variables cannot be read.
    """
    place = detect(env)
    address = f"127.0.0.1:{_free_port()}" if place.size == 1 else place.coordinator
    common = dict(env) | {
        COORDINATOR: address,
        NUM_PROCESSES: str(place.size * processes),
        LOCAL_SIZE: str(processes * (place.local_size or 1)),
        "PYTHONUNBUFFERED": "1",
    }
    if place.size == 1:
        common.setdefault(JOB_SECRET, secrets.token_hex(32))
    if devices is not None:
        flags = [flag for flag in env.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
        common["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])
        common["JAX_PLATFORMS"] = "cpu"
    local = (place.local_rank or 0) * processes
    return [
        common | {PROCESS_ID: str(place.rank * processes + index), LOCAL_RANK: str(local + index)}
        for index in range(processes)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _code(returncode: int) -> int:
    """As a shell says it: 128 and the signal's number for a process that a signal ended."""
    return returncode if returncode >= 0 else 128 - returncode


def _write(out: int, data: bytes) -> None:
    try:
        while data:
            data = data[os.write(out, data) :]
    except OSError:
        pass  # nobody reads any more; the processes go on
