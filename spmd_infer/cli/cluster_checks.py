"""What ``doctor --cluster`` compares over the ranks of a job: versions, clocks, GPUs, paths, and how fast they talk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from spmd_infer.cli.accelerators import Finding, visible_gpus
from spmd_infer.cli.cluster_links import check_links

if TYPE_CHECKING:
    from spmd_infer.multihost.job import Job

MOST_CLOCK_OFFSET_S = 1.0
_PART_BYTES = 16 << 20
_ROUNDS = 5


def check_cluster(job: Job, paths: Sequence[Path]) -> list[Finding]:
    """Every finding; all ranks call it, and all get the same answer."""
    from spmd_infer.multihost.fingerprint import of_environment

    findings = [Finding("processes", f"{job.size} on {', '.join(dict.fromkeys(job.hosts))}")]
    if job.size == 1:
        advice = "start it as a job: spmd-infer launch, srun, mpirun or a manifest of scripts/launch"
        return [*findings, Finding("job", "one process", "hint", advice)]
    findings.append(_compare(job, "versions and settings", dict(of_environment())))
    findings.append(_compare(job, "GPUs", {"seen by the driver": ", ".join(visible_gpus()) or "none"}))
    findings.append(_compare(job, "devices", _devices()))
    findings += [_compare(job, str(path), _path(path), missing="does not exist") for path in paths]
    findings.append(_clocks(job))
    findings.append(_round_trip(job))
    links = check_links(job)
    findings += links
    if all(finding.level == "ok" for finding in links):  # else it would hang
        findings.append(_collective(job))
    return findings


def _gather(job: Job, name: str, value: Any) -> list[Any]:
    return [msgspec.json.decode(part) for part in job.channel.gather(name, msgspec.json.encode(value))]


def _compare(job: Job, name: str, own: dict[str, str], *, missing: str = "") -> Finding:
    from spmd_infer.multihost.fingerprint import difference

    everyone = _gather(job, name, own)
    problem = difference(everyone)
    if problem is not None:
        first, second, part = problem
        a, b = (everyone[rank].get(part, "nothing") for rank in (first, second))
        found = f"{part}: {a} on {job.name_of(first)}, {b} on {job.name_of(second)}"
        return Finding(name, found, "problem", "make them the same on all hosts")
    if missing and missing in own.values():
        return Finding(name, f"{missing} on any host", "problem", "put it on storage that all hosts share")
    return Finding(name, f"the same on all: {', '.join(f'{k} {v}' for k, v in own.items())}")


def _devices() -> dict[str, str]:
    import jax

    local = jax.local_devices()
    return {"platform": local[0].platform, "kind": local[0].device_kind, "on each rank": str(len(local))}


def _path(path: Path) -> dict[str, str]:
    if not path.exists():
        return {"content": "does not exist"}
    from spmd_infer.multihost.fingerprint import of_checkpoint

    return {"content": of_checkpoint(path, {})[:16]}


def _clocks(job: Job) -> Finding:
    """Wall clocks, read right after all ranks have heard the same message."""
    job.channel.gather("now", b"")
    clocks = _gather(job, "clocks", time.time())
    offsets = [clock - median(clocks) for clock in clocks]
    worst = max(range(job.size), key=lambda rank: abs(offsets[rank]))
    found = f"within {max(clocks) - min(clocks):.3f} s"
    if abs(offsets[worst]) <= MOST_CLOCK_OFFSET_S:
        return Finding("clocks", found)
    return Finding(
        "clocks", f"{job.name_of(worst)} is {offsets[worst]:+.1f} s off", "hint", "run NTP: logs will not line up"
    )


def _round_trip(job: Job) -> Finding:
    seconds = []
    for _ in range(20 * _ROUNDS):
        begin = time.perf_counter()
        job.channel.gather("round trip", b"")
        seconds.append(time.perf_counter() - begin)
    slowest = max(_gather(job, "round trips", median(seconds)))
    return Finding("control channel", f"all ranks and back in {1e6 * slowest:.0f} us")


def _collective(job: Job) -> Finding:
    """Every device gets a part from every other: what the link between hosts gives a collective."""
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    part = np.ones((1, _PART_BYTES // 4 // jax.device_count()), np.float32)
    shape = (jax.device_count(), part.shape[1])
    x = jax.make_array_from_callback(shape, split, lambda _: part)
    everywhere = jax.jit(lambda x: x + 0, out_shardings=whole)
    jax.block_until_ready(everywhere(x))
    seconds = []
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        jax.block_until_ready(everywhere(x))
        seconds.append(time.perf_counter() - begin)
    slowest = max(_gather(job, "collective", median(seconds)))
    rate = part.nbytes * (jax.device_count() - 1) / slowest
    what = f"all-gather of {part.nbytes * jax.device_count() >> 20} MiB over {jax.device_count()} devices"
    return Finding("link", f"{what}: {1e3 * slowest:.1f} ms, {rate / 1e9:.2f} GB/s into each device")
