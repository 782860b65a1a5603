"""Whether all ranks are about to do the same: what each one runs, in parts that a person can tell apart.

Ranks with different programs, plans, weights or versions do not fail by themselves: they wait for each other, or give
wrong results. So they compare before the first step.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from spmd_infer.errors import ClusterError

if TYPE_CHECKING:
    from spmd_infer.batching import Buckets
    from spmd_infer.multihost.job import Job
    from spmd_infer.opening import OpenedModel
    from spmd_infer.placement import Placement

PACKAGES = ("spmd-infer", "jax", "jaxlib", "flax", "numpy")
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
PREFIX = "JAX_"
OWN_VARIABLES = frozenset(
    ("JAX_COMPILATION_CACHE_DIR", "JAX_LOCAL_DEVICE_IDS", "JAX_PROCESS_ID", "JAX_COORDINATOR_BIND_ADDRESS")
)
COMPARE_S = 600.0  # ranks may have compiled for minutes, some longer than others

Fingerprint = Mapping[str, str]


def agree(job: Job, what: str, own: Fingerprint) -> None:
    """Compare fingerprints over all ranks; every rank must call it.

    Args:
        job: the job.
        what: names the comparison.
        own: this rank's parts by name: short readable values, or digests.

    Raises:
        ClusterError: a part differs; the message names two ranks that differ, the part, and both values. Every rank
            raises it.
    """
    if job.channel is None:
        return
    with job.step(f"compare {what}"[:48], COMPARE_S):
        values = job.channel.gather(f"fingerprint of {what}", msgspec.json.encode(own), COMPARE_S)
    everyone = [msgspec.json.decode(value, type=dict[str, str]) for value in values]
    problem = difference(everyone)
    if problem is not None:
        first, second, part = problem
        a, b = (everyone[rank].get(part, "nothing") for rank in (first, second))
        raise ClusterError(
            f"{job.name_of(first)} and {job.name_of(second)} differ in {what}, {part}: {_shown(a)} and {_shown(b)}"
        )


def difference(everyone: list[dict[str, str]]) -> tuple[int, int, str] | None:
    """Two ranks and the part in which they differ: the one that is alone, where most agree; None where all do."""
    for part in dict.fromkeys(name for own in everyone for name in own):
        values = [own.get(part) for own in everyone]
        if len(set(values)) > 1:
            usual = max(values, key=values.count)
            other = next(rank for rank, value in enumerate(values) if value != usual)
            return min(values.index(usual), other), max(values.index(usual), other), part
    return None


def of_environment() -> Fingerprint:
    """Versions and settings that change what is compiled."""
    parts = {f"version of {name}": metadata.version(name) for name in PACKAGES}
    parts["python"] = ".".join(platform.python_version_tuple()[:2])
    for name in sorted(os.environ):
        if name in VARIABLES or (name.startswith(PREFIX) and name not in OWN_VARIABLES):
            parts[f"variable {name}"] = os.environ[name]
    return parts


def of_placement(placement: Placement, buckets: Buckets, opened: OpenedModel | None) -> Fingerprint:
    """What an engine runs: plan, the weights' names, shapes and places, the model's configuration and checkpoint.

    Args:
        placement: the model on its mesh.
        buckets: the batch sizes that programs are compiled for.
        opened: the zoo model and its checkpoint; None for a model of the caller's own.
    """
    plan, params = placement.plan, placement.params
    parts = {
        **of_environment(),
        "mesh": str(plan.mesh),
        "plan": _digest([str(weight) for weight in plan.weights]),
        "weights": _digest({path: [w.shape, w.dtype.name, str(w.sharding)] for path, w in params.items()}),
        "buckets": str(buckets.sizes),
        "devices": str([d.id for d in placement.mesh.devices.flat]),
    }
    if opened is not None:
        parts["configuration"] = f"{type(opened.config).__name__} {_digest(str(opened.config))}"
        parts["checkpoint"] = of_checkpoint(opened.reader.path, opened.reader.tensors)
    return parts


def of_program(hlo: str) -> Fingerprint:
    """A compiled program, without the names of source files, which may lie elsewhere on another host."""
    plain = re.sub(r", metadata={[^}]*}|(?m:^(FileNames|FunctionNames|FileLocations|StackFrames)\n(\d.*\n)*)", "", hlo)
    return {"instructions": str(plain.count(" = ")), "HLO": hashlib.sha256(plain.encode()).hexdigest()}


def of_checkpoint(path: Path, tensors: Mapping[str, Any]) -> str:
    """A digest of a checkpoint: of its manifest where it has one, else of its tensors and a sample of its files.

    The sample is the first and last 64 KiB of each file and its size: all of a large checkpoint would take minutes.
    """
    digest = hashlib.sha256(json.dumps({name: str(info) for name, info in tensors.items()}, sort_keys=True).encode())
    manifest = path / "manifest.json"
    if manifest.is_file():
        digest.update(manifest.read_bytes())
        return digest.hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(_SAMPLE))
            if size > _SAMPLE:
                content.seek(max(_SAMPLE, size - _SAMPLE))
                digest.update(content.read(_SAMPLE))
    return digest.hexdigest()


_SAMPLE = 64 << 10


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _shown(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:24]}… ({len(value)} characters, {_digest(value)[:12]})"
