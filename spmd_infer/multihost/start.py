"""``spmd_infer.initialize``: find the job, meet its other processes, start JAX over all of them."""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.channel import open_channel
from spmd_infer.multihost.detection import RANK_PID, detect, local_devices
from spmd_infer.multihost.job import Job, current_job
from spmd_infer.multihost.link import Link
from spmd_infer.multihost.place import Place, parse_int
from spmd_infer.multihost.record import Record
from spmd_infer.multihost.secret import job_secret

BIND = "SPMD_INFER_BIND"
INIT_TIMEOUT = "SPMD_INFER_INIT_TIMEOUT"
HEARTBEAT = "SPMD_INFER_HEARTBEAT"
DRAIN = "SPMD_INFER_DRAIN"
STEP = "SPMD_INFER_STEP"

_NO_PROXY = "no_grpc_proxy"
_STALL_S = 60
_EXIT_S = 300
_GUARD = "import sys; sys.path.insert(0, {root!r}); from spmd_infer.multihost.guard import main; main()"


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    bind: str | None = None,
    local_device_ids: Sequence[int] | None = None,
    init_timeout: int | None = None,
    heartbeat: int | None = None,
    drain: int | None = None,
    step: int | None = None,
    quiet: bool = False,
) -> Job:
    """Join the job that this process is part of; call it before JAX is used.

    What is not given is taken from ``SPMD_INFER_COORDINATOR``, ``_NUM_PROCESSES``, ``_PROCESS_ID``, ``_BIND``,
    ``_LOCAL_DEVICES``, ``_INIT_TIMEOUT``, ``_HEARTBEAT``, ``_DRAIN`` and ``_STEP``, then from what SLURM, Open MPI or
    Kubernetes say. A process that nobody started as part of a job is a job of one.

    A guard process watches this one from here on; see ``Job``.

    Args:
        coordinator: ``host:port`` where rank 0 waits for the others.
        num_processes: how many processes the job has.
        process_id: this process's rank.
        bind: the address on which rank 0 listens; default what the coordinator's name resolves to. Only there, not on
            every interface.
        local_device_ids: which of the host's GPUs are this process's; default an even share in rank order.
        init_timeout: seconds in which all processes must have come; default 60.
        heartbeat: seconds without a word after which a host counts as lost; default 10.
        drain: seconds that ranks have, after SIGTERM, to come to a point where they can stop; default 30.
        step: seconds that one dispatch or one wait of the engine may take outside of ``job.step``; default 600.
        quiet: print nothing where all goes well.

    Returns:
        The job; use it with ``with``.

    Raises:
        ClusterError: variables contradict each other or are missing, the port is taken, or processes did not come in
            time; the message names the variable or the ranks.
    """
    job = current_job()
    if job is not None:
        return job
    env = os.environ
    place = detect(env, coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    limits = {
        "init_s": _seconds(env, INIT_TIMEOUT, init_timeout, 60),
        "silence_s": _seconds(env, HEARTBEAT, heartbeat, 10),
        "drain_s": _seconds(env, DRAIN, drain, 30),
        "step_s": _seconds(env, STEP, step, 600),
        "stall_s": _STALL_S,
        "exit_s": _EXIT_S,
    }
    if place.size == 1:
        job = Job(place, None, [socket.gethostname()], [os.getpid()])
        job.arm()
        if not quiet:
            _say(place, place.describe())
        return job
    _refuse_started_jax()
    devices = list(local_device_ids) if local_device_ids is not None else local_devices(place, env, visible_gpus(env))
    begin = time.monotonic()
    job = _join(place, bind or env.get(BIND), limits, devices, quiet=quiet)
    if not quiet and place.rank == 0:
        import jax

        hosts = len(set(job.hosts))
        _say(
            place,
            f"all {place.size} processes on {hosts} host{'s' if hosts > 1 else ''} are here after "
            f"{time.monotonic() - begin:.1f} s: {jax.device_count()} {jax.devices()[0].platform} devices",
        )
    return job


def _join(place: Place, bind: str | None, limits: Mapping[str, int], devices: list[int] | None, *, quiet: bool) -> Job:
    secret = job_secret(os.environ)
    if not quiet:
        _say(place, place.describe())
    bound = _resolve(bind or place.host, BIND if bind else "the coordinator's host") if place.rank == 0 else ""
    welcome: dict[str, Any] = {"jax_port": _free_port(bound)} if place.rank == 0 else {}
    channel, nonce = open_channel(place, bound)
    if place.rank == 0:
        welcome |= {"channel_port": channel.port, "channel_nonce": nonce.hex()}
    link = start_guard(place, bound, secret, limits, welcome)
    said = link.wait(("welcome", "refused"), limits["init_s"] + 15)
    if said is None or said["t"] == "refused":
        link.finished = True
        raise ClusterError(said["why"] if said else f"rank {place.rank}'s guard gave no answer")
    hosts, pids = zip(*said["roster"], strict=True)
    job = Job(place, link, hosts, pids, limits["step_s"])
    job.channel = channel
    job.arm()
    faulthandler.enable(all_threads=True)
    os.environ[RANK_PID] = str(os.getpid())
    with job.step("start JAX", 3 * limits["init_s"]):
        nonce = bytes.fromhex(said["channel_nonce"])
        channel.join(place.host, said["channel_port"], nonce, secret, limits["init_s"])
        _start_jax(place, bound, said["jax_port"], limits, devices)
        from spmd_infer.multihost.compiling import share_compile_cache  # it imports JAX

        share_compile_cache(job)
    return job


def start_guard(place: Place, bound: str, secret: bytes, limits: Mapping[str, int], welcome: Mapping[str, Any]) -> Link:
    """Start the process that guards this one; the time-out for all to come counts from here."""
    began = time.monotonic()  # the guard reads the same clock
    record = Record.create()
    ours, theirs = socket.socketpair()
    config = {
        "rank": place.rank, "size": place.size, "address": [place.host, place.port], "bind": bound, "port": place.port,
        "hosts": place.hosts, "host": socket.gethostname(), "pid": os.getpid(), "secret": secret.hex(),
        "began": began, "welcome": welcome, "socket_fd": theirs.fileno(), "record_fd": record.fd, **limits,
    }  # fmt: skip
    root = str(Path(__file__).parents[2])
    # -S: without site-packages a guard starts in a moment, and nothing there can run in it.
    guard = subprocess.Popen(
        [sys.executable, "-S", "-c", _GUARD.format(root=root)],
        stdin=subprocess.PIPE,
        pass_fds=(theirs.fileno(), record.fd),
    )
    theirs.close()
    assert guard.stdin is not None
    guard.stdin.write(json.dumps(config).encode() + b"\n")
    guard.stdin.close()
    link = Link(ours, record, f"rank {place.rank}")
    link.guard = guard
    return link


def _start_jax(place: Place, bound: str, port: int, limits: Mapping[str, int], devices: list[int] | None) -> None:
    # JAX's own notice of preemption would swallow SIGTERM, and gRPC would ask a proxy for the coordinator.
    os.environ[_NO_PROXY] = ",".join(filter(None, (os.environ.get(_NO_PROXY), place.host)))
    import jax

    jax.config.update("jax_check_proxy_envs", False)
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = f"[{place.host}]" if ":" in place.host else place.host
    own = f"[{bound}]" if ":" in bound else bound
    jax.distributed.initialize(
        f"{host}:{port}",
        place.size,
        place.rank,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=limits["init_s"],
        # The guards notice sooner, and name the rank; JAX's own abort is for when they fail.
        heartbeat_timeout_seconds=10 * limits["silence_s"],
        shutdown_timeout_seconds=30,
        coordinator_bind_address=f"{own}:{port}" if place.rank == 0 else None,
    )
    jax.devices()


def _refuse_started_jax() -> None:
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is not None and bridge.backends_are_initialized():
        raise ClusterError("initialize() came after JAX was used: call it before jax.devices(), any array or Engine")


def visible_gpus(env: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this process may see, without starting CUDA."""
    if env.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return 0
    said = env.get("CUDA_VISIBLE_DEVICES")
    if said is not None:
        return len([part for part in said.split(",") if part.strip() not in ("", "-1")])
    return sum(1 for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia[0-9]+", path.name))


def _seconds(env: Mapping[str, str], name: str, given: int | None, default: int) -> int:
    if given is not None:
        return parse_int(str(given), name.removeprefix("SPMD_INFER_").lower(), 1, 86400)
    return parse_int(env[name], name, 1, 86400) if env.get(name) else default


def _resolve(host: str, said_by: str) -> str:
    """An address of this host to listen on."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ClusterError(f"rank 0 cannot find the address of {host!r} ({said_by}): {error.strerror}") from error
    addresses = sorted(found, key=lambda one: one[0] != socket.AF_INET)
    return str(addresses[0][4][0])


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            raise ClusterError(
                f"rank 0 cannot listen on {address} ({error.strerror}): it is no address of this host "
                f"({socket.gethostname()}); start rank 0 on the coordinator's host, or see SPMD_INFER_COORDINATOR and "
                f"{BIND}"
            ) from error
        return int(probe.getsockname()[1])


def _say(place: Place, text: str) -> None:
    sys.stderr.write(f"[spmd-infer rank {place.rank}] {text}\n")
    sys.stderr.flush()
